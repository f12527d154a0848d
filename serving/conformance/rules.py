"""What a check is, and the ways in which it can end.

A check is a function that returns when the server keeps the rule, and raises when it does not:

    Violation   the server breaks the rule
    Refused     a call failed; a violation, unless the server may leave the RPC out and did
    NotOffered  the server does not do this, and never said that it would
    Skipped     nothing to test the rule with, here
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import grpc

if TYPE_CHECKING:
    from serving.conformance.probe import Probe

T = TypeVar("T")

_DETAILS_SHOWN = 240  # characters of a status; some servers put a traceback there


class Group(enum.StrEnum):
    """Whose rules they are."""

    REQUIRED = "required"  # the Open Inference Protocol: every server
    EXTENSION = "extension"  # Triton's documents: servers that list the extension or answer its RPC
    GRPC = "grpc"  # gRPC's own services: servers that have them
    ROBUSTNESS = "robustness"  # no document has them; clients would be misled or servers fall without them


class Check(NamedTuple):
    """One rule and how it is tested."""

    id: str  # stable: reports are compared by it
    group: Group
    rule: str  # the document and its section
    run: Callable[[Probe], None]
    extension: str = ""  # as ServerMetadata.extensions names it


class Violation(Exception):
    """The server breaks the rule."""

    def __init__(self, wanted: str, got: object) -> None:
        super().__init__(f"wanted {wanted}, got {got}")
        self.wanted = wanted
        self.got = str(got)


class NotOffered(Exception):
    """The server does not do this; a violation if it lists the extension."""


class Skipped(Exception):
    """The rule cannot be tested on this server or model; the text says why."""


class Refused(Exception):
    """A call ended with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        shown = details if len(details) <= _DETAILS_SHOWN else details[:_DETAILS_SHOWN] + "…"
        super().__init__(f"{code.name}: {shown}")
        self.code = code


def expect(kept: bool, wanted: str, got: object) -> None:
    """Raise Violation unless the rule is kept."""
    if not kept:
        raise Violation(wanted, got)


def answered(send: Callable[[], T]) -> T:
    """What `send` returns; a status other than OK becomes Refused."""
    try:
        return send()
    except grpc.RpcError as error:
        raise Refused(error.code(), error.details() or "") from error


def refused(send: Callable[[], object], *codes: grpc.StatusCode) -> None:
    """Raise Violation unless `send` ends with one of these codes."""
    wanted = " or ".join(code.name for code in codes)
    try:
        send()
    except Refused as error:
        expect(error.code in codes, wanted, error)
    else:
        raise Violation(wanted, "OK")
