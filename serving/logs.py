"""The log: one line an event, as text or as JSON, and what it says of requests.

A record may have `extra={"fields": {...}}`: names and values that JSON keeps apart and text appends. What clients sent
is shortened and cannot break a line.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.config import ServerConfig

server = logging.getLogger("serving.server")
requests = logging.getLogger("serving.requests")

Fields = Mapping[str, Any]

REFUSED_PER_S = 20  # an overloaded server refuses thousands, and must not spend its time on telling so
_LONGEST = 500  # characters of what a client sent

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {ord("\n"): "\\n", 0x2028: " ", 0x2029: " "}


def configure(config: ServerConfig, worker: int | None = None) -> None:
    """Log to stderr as the settings say, `worker` being the number of one process of several."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json(worker) if config.log_format == "json" else Text(worker))
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    logging.basicConfig(level=max(level, logging.INFO), handlers=[handler], force=True)
    logging.getLogger("serving").setLevel(level)  # details of ours only, not of every library
    requests.setLevel(logging.WARNING if config.log_requests == "none" else logging.NOTSET)


class Text(logging.Formatter):
    """A line for people."""

    def __init__(self, worker: int | None = None) -> None:
        who = "" if worker is None else f"worker {worker}: "
        super().__init__(f"%(asctime)s %(levelname)s {who}%(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, but for the traceback."""
        if not (fields := _fields(record)):
            return super().formatMessage(record)
        shown = " ".join(f"{name}={_plain(value)}" for name, value in fields.items())
        return f"{_plain(super().formatMessage(record))} ({shown})"


class Json(logging.Formatter):
    """An object on a line of its own: time, level, logger, message, and the record's fields."""

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._process = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        shown: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **self._process,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            shown["exception"] = self.formatException(record.exc_info)
        return json.dumps(shown, default=str)


def _fields(record: logging.LogRecord) -> Fields:
    fields: Fields = getattr(record, "fields", {})
    return fields


def _plain(value: object) -> str:
    """A text on one line."""
    return str(value).translate(_CONTROL)


class _Allowance:
    """So many a second, and how many more there were."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._second = 0
        self._used = 0
        self._withheld = 0

    def take(self, count: int) -> int | None:
        """How many of these and before them are withheld when one of them is not; None when all of them are."""
        if (second := int(time.monotonic())) != self._second:
            self._second, self._used = second, 0
        if self._used >= self._per_s:
            self._withheld += count
            return None
        self._used += 1
        withheld, self._withheld = self._withheld + count - 1, 0
        return withheld


_refusals = _Allowance(REFUSED_PER_S)


def started(address: str, ready: bool) -> None:
    """Where the server is now, and whether all that should be served is."""
    if ready:
        server.info("READY on %s", address)
    else:
        server.warning("NOT READY on %s, see the errors above", address)


def refused(code: str, details: str, about: Callable[[], Fields], count: int = 1) -> None:
    """A request that was answered with another status than OK, for a reason that is not ours; or several alike."""
    if not requests.isEnabledFor(logging.INFO) or (withheld := _refusals.take(count)) is None:
        return
    fields = {"code": code, **about(), **({"withheld": withheld} if withheld else {})}
    requests.info("%s", details[:_LONGEST], extra={"fields": fields})


def answered(about: Fields, start_ns: int, answers: int) -> None:
    """A call that ended well, `answers` being the number of its answers, and began at `start_ns` of `monotonic_ns`."""
    fields = {"code": "OK", **about, "ms": round((time.monotonic_ns() - start_ns) / 1e6, 3), "answers": answers}
    requests.info("answered", extra={"fields": fields})


def about(method: str, peer: str, metadata: Iterable[tuple[str, str | bytes]], request_id: str = "") -> Fields:
    """What tells a call from others: its id is the request's, or else what the metadata has as x-request-id."""
    if not request_id:
        request_id = next((str(value) for key, value in metadata if key == "x-request-id"), "")
    fields = {"method": method.lstrip("/"), "peer": peer, "request_id": request_id[:_LONGEST]}
    return {name: value for name, value in fields.items() if value}


def text_field(data: bytes, number: int) -> str:
    """The text that a message's bytes have in a field, without parsing the rest; empty when there is none.

    https://protobuf.dev/programming-guides/encoding/
    """
    position, found = 0, ""
    try:
        while position < len(data):
            key, position = _varint(data, position)
            match key & 7:
                case 0:
                    _, position = _varint(data, position)
                case 1:
                    position += 8
                case 2:
                    length, position = _varint(data, position)
                    if key >> 3 == number:
                        found = data[position : position + min(length, 4 * _LONGEST)].decode("utf-8", "replace")
                    position += length
                case 5:
                    position += 4
                case _:
                    return found
    except IndexError:  # the bytes are no message
        return found
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number, seven bits a byte and the lowest first, and the position behind it."""
    value = shift = 0
    while True:
        octet = data[position]
        position += 1
        value |= (octet & 127) << shift
        if octet < 128:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError
