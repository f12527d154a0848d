"""ModelInfer requests that differ from one answered before in nothing but their id and their tensor's bytes.

A client sends the same request again and again with other images. Parsing it into objects, checking names, datatypes
and shapes, and building the answer's objects gives the same result every time, and costs more than all the rest of a
small request. So what one full decoding found is kept, and a request whose bytes are the same around the id and the
tensor is answered from it: nothing about it goes unchecked, since every byte that would be checked is equal.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from protos import open_inference as pb
from serving import logs
from serving.errors import RequestError
from serving.repository import Repository, ServedModel
from serving.scheduler import Closed, OnLoop, Request, Waiter
from serving.services.statuses import to_status
from serving.statistics import Rpcs, Statistics
from serving.tensors import DATATYPES, Layout
from serving.wire import Requested

_LARGE = 1 << 14  # bytes that are not copied
_MAX_PREPARED = 256  # then all are forgotten: a client that never repeats itself must not fill the memory

# Datatypes whose bytes are numpy's as they are, whatever they hold.
_PLAIN = frozenset(DATATYPES) - {"BOOL", "BF16", "BYTES"}

# The keys of fields that have a length, (number << 3) | 2: a request's first three, and an answer's in a stream.
_MODEL_NAME, _MODEL_VERSION, _ID = b"\x0a\x12\x1a"
_INFER_RESPONSE = b"\x12"

Waits = TypeVar("Waits", bound=Waiter)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the full decoding of a request found."""

    model_name: str
    model_version: str  # as the request has it, which may be empty
    served: weakref.ref[ServedModel]  # a model that is replaced goes, and what is prepared for it is of no use
    middle: bytes  # of the request, between the id and the tensor's bytes
    layout: Layout  # of the tensor
    head: bytes  # of the answer, before the id
    tail: bytes  # of the answer, between the id and the outputs' bytes
    outputs: tuple[tuple[str, bytes, int], ...]  # name, key with length, and length in bytes


class PreparedRequests:
    """The prepared requests of one server."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._prepared: dict[tuple[bytes, int], Prepared] = {}

    def submit(self, data: bytes, deadline_ns: float, wait: Callable[[Running], Waits]) -> Waits | None:
        """Put a request to its model, if it is prepared; None where it has to be decoded in full.

        Args:
            data: the request's bytes.
            deadline_ns: when nobody waits for the answer any more, in `time.monotonic_ns()` nanoseconds.
            wait: makes what waits for the answer.

        Raises:
            RequestError: it cannot be answered.
        """
        start_ns = time.monotonic_ns()
        if (field := _id_field(data)) is None:
            return None
        start, end = field
        prepared = self._prepared.get((data[:start], len(data) - end))
        if prepared is None or not data.startswith(prepared.middle, end):
            return None
        identity = data[start:end]
        served = self._repository.get(prepared.model_name, prepared.model_version)
        if not identity.isascii() or served is not prepared.served():
            return None  # the id might not be UTF-8; another version may answer otherwise
        at = end + len(prepared.middle)
        raw = data[at:] if len(data) < _LARGE else memoryview(data)[at:]
        running = Running(prepared, served.statistics, identity, start_ns)
        try:
            waiter = wait(running)
            served.scheduler.submit(prepared.layout, (raw,), deadline_ns, waiter)
        except Closed:
            return None
        except RequestError:
            running.failed()
            raise
        return waiter

    def learn(
        self,
        data: bytes,
        request: pb.ModelInferRequest,
        served: ServedModel,
        wanted: list[Requested],
        response: pb.ModelInferResponse,
    ) -> None:
        """Prepare for more requests like one that was decoded in full and answered, where that can be done.

        Args:
            data: the request's bytes.
            request: the message that they were parsed to.
            served: what answered it.
            wanted: its outputs.
            response: the answer.
        """
        specs = {spec.name: spec for spec in served.backend.outputs}
        if (
            not served.max_batch_size
            or len(request.inputs) != 1
            or len(request.raw_input_contents) != 1
            or request.inputs[0].datatype not in _PLAIN
            or request.inputs[0].parameters
            or request.parameters
            or any(output.classes or output.region for output in wanted)
            or any(specs[output.name].datatype not in _PLAIN for output in wanted)
            or any(isinstance(axis, str) for output in wanted for axis in specs[output.name].shape[1:])
            # Fields in another order, twice, or unknown: only the parser knows what they come to.
            or request.SerializeToString() != data
            or (field := _id_field(data)) is None
        ):
            return
        start, end = field
        tensor, raw = request.inputs[0], request.raw_input_contents[0]
        outputs = []
        for output, raw_output in zip(wanted, response.raw_output_contents, strict=True):
            message = pb.ModelInferResponse(raw_output_contents=[raw_output]).SerializeToString()
            outputs.append((output.name, message[: len(message) - len(raw_output)], len(raw_output)))
        head = pb.ModelInferResponse(model_name=response.model_name, model_version=response.model_version)
        if len(self._prepared) >= _MAX_PREPARED:
            self._prepared.clear()
        self._prepared[data[:start], len(data) - end] = Prepared(
            model_name=request.model_name,
            model_version=request.model_version,
            served=weakref.ref(served),
            middle=data[end : len(data) - len(raw)],
            layout=Layout([(tensor.name, DATATYPES[tensor.datatype], tuple(tensor.shape))]),
            head=head.SerializeToString(),
            tail=pb.ModelInferResponse(outputs=response.outputs).SerializeToString(),
            outputs=tuple(outputs),
        )


class Running:
    """A request that was put to its model, and the bytes of its answer's message."""

    __slots__ = ("_id", "_prepared", "_start_ns", "_statistics")

    def __init__(self, prepared: Prepared, statistics: Statistics, identity: bytes, start_ns: int) -> None:
        self._prepared = prepared
        self._statistics = statistics
        self._id = identity  # the field, with its key
        self._start_ns = start_ns

    def failed(self) -> None:
        """Count that nobody gets the answer."""
        self._statistics.failed(self._start_ns)

    def message(self, answer: Request) -> bytes:
        """The answer's message, which is counted."""
        parts = [self._prepared.head, self._id, self._prepared.tail]
        for name, key, length in self._prepared.outputs:
            raw = answer.raw(name)
            if len(raw) != length:
                raise RuntimeError(f"output {name} has {len(raw)} bytes, its shape in the model needs {length}")
            parts.append(key)
            parts.append(raw)
        message = b"".join(parts)
        self._statistics.succeeded(self._start_ns, answer)
        return message


class Awaited(OnLoop):
    """A running request whose answer is awaited on the event loop."""

    __slots__ = ("_running",)

    def __init__(self, running: Running) -> None:
        super().__init__()
        self._running = running

    def cancel(self) -> None:
        """Withdraw the request, which nobody has awaited yet."""
        self.future.cancel()
        self._running.failed()

    def __await__(self) -> Generator[Any, None, bytes]:
        try:
            answer = yield from self.future
            return self._running.message(answer)
        except BaseException:
            self._running.failed()
            raise


class Streamed(Awaited):
    """As `Awaited`, of a stream: gives a stream's message, in which an error is an answer too."""

    __slots__ = ("_data", "_rpcs")

    def __init__(self, data: bytes, rpcs: Rpcs, running: Running) -> None:
        super().__init__(running)
        self._data = data
        self._rpcs = rpcs

    def __await__(self) -> Generator[Any, None, bytes]:
        try:
            message = yield from super().__await__()
        except Exception as error:
            return stream_error(pb.ModelInferRequest.FromString(self._data), error, self._rpcs).SerializeToString()
        return _INFER_RESPONSE + _varint(len(message)) + message


def stream_error(request: pb.ModelInferRequest, error: Exception, rpcs: Rpcs) -> pb.ModelStreamInferResponse:
    """What a stream answers to a request that failed, which is counted."""
    method = f"{pb.SERVICE}/ModelStreamInfer"
    code, details = to_status(error, lambda: logs.about(method, "", (), request.id))
    rpcs.stream_error(method, code.name)
    whose = pb.ModelInferResponse(id=request.id, model_name=request.model_name, model_version=request.model_version)
    return pb.ModelStreamInferResponse(error_message=details, infer_response=whose)


def _id_field(data: bytes) -> tuple[int, int] | None:
    """Where the id stands in a request whose fields are in order, begin and end; equal when it has none.

    None for what is too short, and for names and ids of 128 bytes and more, whose length takes several bytes.
    """
    start = position = 0
    try:
        for key in (_MODEL_NAME, _MODEL_VERSION, _ID):
            start = position
            if data[position] == key:
                if data[position + 1] >= 128:
                    return None
                position += 2 + data[position + 1]
    except IndexError:
        return None
    return start, position


def _varint(number: int) -> bytes:
    """A length as protobuf writes it: seven bits a byte, the lowest first."""
    octets = bytearray()
    while number >= 128:
        octets.append(number & 127 | 128)
        number >>= 7
    octets.append(number)
    return bytes(octets)
