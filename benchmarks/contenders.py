"""The servers that are compared: the bound, ours, and peers, each started as its users start it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes import free_port
from serving.bundle import Bundle

BOUND, OURS = "bare echo", "parityserve"


@dataclass(frozen=True)
class Contender:
    """How to start a server, and what it can do."""

    name: str
    command: Sequence[str]
    port: int  # where it will listen, on 127.0.0.1
    computes: bool = True  # it runs the model
    streams: bool = True  # it has ModelStreamInfer
    env: Mapping[str, str] | None = None
    about: dict[str, str] = field(default_factory=dict)  # versions, for the report


def bound(bundle: Bundle) -> Contender:
    """grpc.aio without a model."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.echo", "--port", str(port)]
    for spec in bundle.manifest.outputs:
        elements = math.prod(axis for axis in spec.shape[1:] if isinstance(axis, int))
        command += ["--output", f"{spec.name}:{spec.datatype}:{elements}"]
    return Contender(BOUND, command, port, computes=False)


def ours(repository: Path, model: str, extra: Sequence[str] = (), name: str = OURS) -> Contender:
    """This project's server on the CPU; `extra` are more of its options."""
    port = free_port()
    command = [sys.executable, "-m", "serving", "serve", "--repository", str(repository), "--model", model]
    return Contender(name, [*command, "--device", "cpu", "--port", str(port), *extra], port)
