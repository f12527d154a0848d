"""The gRPC services: each decodes a request, asks the repository and its scheduler, and encodes the answer.

A servicer is a class with one method for each RPC, which takes and gives messages and raises the errors of
`serving.errors`. `handler` makes it callable over gRPC. A method marked `@in_bytes` takes and gives their bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from serving import logs, rpc
from serving.config import ServerConfig
from serving.errors import InvalidArgument, MessageTooLarge, Unavailable
from serving.repository import Repository, ServedModel
from serving.scheduler import Closed
from serving.services.gate import STOPPING, Gate
from serving.services.statuses import to_status, trailing_metadata
from serving.statistics import Rpcs, Stages

Method = TypeVar("Method", bound=Callable[..., Any])
Context = rpc.Call
Request = TypeVar("Request")
Answer = TypeVar("Answer")
Given = TypeVar("Given", covariant=True)

STREAM_IN_FLIGHT = 64  # requests of one stream that run at once; a client that sends more waits


def in_bytes(method: Method) -> Method:
    """Mark a servicer's method that takes the bytes of its requests, and gives those of its answers."""
    method.__dict__["in_bytes"] = True
    return method


def handler(
    servicer: object, service: ServiceDescriptor, rpcs: Rpcs, gate: Gate, config: ServerConfig
) -> grpc.GenericRpcHandler:
    """The RPCs of a service, answered by the methods of the same names, and counted in `rpcs`; `gate` ends streams.

    Messages are measured and parsed here: `serving.rpc` knows neither what they are nor which option limits their size.
    """
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        answer = getattr(servicer, method.name)
        raw = hasattr(answer, "in_bytes")
        parse = bytes if raw else parser(message_factory.GetMessageClass(method.input_type))
        parsed = _limited(parse, config.max_message_bytes)
        serialize = None if raw else _serialize
        rpc = Rpc(f"{service.full_name}/{method.name}", _id_field(method.input_type), rpcs)
        if method.server_streaming:
            stream = _stream(answer, parsed, rpc, gate)
            methods[method.name] = grpc.stream_stream_rpc_method_handler(
                _logged_stream(stream, rpc) if config.log_requests == "all" else stream, response_serializer=serialize
            )
        else:
            unary = _unary(answer, parsed, rpc)
            methods[method.name] = grpc.unary_unary_rpc_method_handler(
                _logged_unary(unary, rpc) if config.log_requests == "all" else unary, response_serializer=serialize
            )
    return grpc.method_handlers_generic_handler(service.full_name, methods)


class Pending(Protocol[Given]):
    """An answer that is not there yet: a task, or what costs less."""

    def __await__(self) -> Generator[Any, None, Given]: ...

    def cancel(self) -> object:
        """Nobody waits for it any more."""


async def in_order(
    requests: AsyncIterator[Request], begin: Callable[[Request], Pending[Answer]]
) -> AsyncIterator[Answer]:
    """Answer a stream's requests concurrently, and give the answers in the order of the requests.

    `begin` and what it gives raise nothing: an error that must not end the stream is an answer too.
    """
    running: asyncio.Queue[Pending[Answer] | None] = asyncio.Queue(STREAM_IN_FLIGHT)

    async def read() -> None:
        try:
            async for request in requests:
                pending = begin(request)
                try:
                    await running.put(pending)
                except asyncio.CancelledError:
                    pending.cancel()
                    raise
        finally:
            await running.put(None)

    reader = asyncio.create_task(read())
    try:
        while (first := await running.get()) is not None:
            yield await first
        await reader
    finally:  # the client may have gone: nobody waits for the rest
        reader.cancel()
        while not running.empty():
            if (left := running.get_nowait()) is not None:
                left.cancel()


async def ask(
    repository: Repository,
    name: str,
    version: str,
    question: Callable[[ServedModel], Awaitable[tuple[Answer, Stages]]],
) -> Answer:
    """Put a question to a model, and count it; when the model is replaced meanwhile, put it to its successor.

    Args:
        repository: where the model is.
        name: the model's.
        version: a number, or empty for the newest.
        question: gives the answer, and when the request went through the model's stages.
    """
    while True:
        served = repository.get(name, version)
        start_ns = time.monotonic_ns()
        try:
            answer, stages = await question(served)
        except BaseException as error:
            if isinstance(error, Closed) and repository.get(name, version) is not served:
                continue
            served.statistics.failed(start_ns)
            raise
        served.statistics.succeeded(start_ns, stages)
        return answer


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def parser(message: type[Message]) -> Callable[[bytes], Any]:
    """What makes a message of its bytes, and InvalidArgument of bytes that are none."""

    def parse(data: bytes) -> Any:
        try:
            return message.FromString(data)
        except DecodeError as error:
            raise InvalidArgument(
                f"{len(data)} bytes that are not a {message.DESCRIPTOR.full_name}: {error}"
            ) from error

    return parse


def _limited(parse: Callable[[bytes], Any], max_bytes: int) -> Callable[[bytes], Any]:
    """`parse`, and MessageTooLarge for more than `max_bytes`."""

    def limited(data: bytes) -> Any:
        if len(data) > max_bytes:
            raise MessageTooLarge(f"got a message of {len(data)} bytes, want at most {max_bytes} (--max-message-bytes)")
        return parse(data)

    return limited


def _id_field(request: Descriptor) -> int:
    """The number of the field that has a request's id; 0 where requests have none."""
    field = request.fields_by_name.get("id")
    return field.number if field else 0


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method: how its calls are counted, and told apart in the log."""

    name: str  # service/method
    id_field: int
    rpcs: Rpcs

    def ended(self, code: str) -> None:
        """Count a call that ended with the status code named."""
        self.rpcs.call_ended(self.name, code)

    def about(self, context: Context, data: bytes) -> logs.Fields:
        """What the log says of a call with this request."""
        request_id = logs.text_field(data, self.id_field) if self.id_field else ""
        return logs.about(self.name, context.peer(), context.invocation_metadata(), request_id)


def _logged_unary(call: Callable[..., Awaitable[Any]], rpc: Rpc) -> Callable[..., Awaitable[Any]]:
    async def logged(data: bytes, context: Context) -> Any:
        start_ns = time.monotonic_ns()
        response = await call(data, context)
        logs.answered(rpc.about(context, data), start_ns, 1)
        return response

    return logged


def _logged_stream(call: Callable[..., AsyncIterator[Any]], rpc: Rpc) -> Callable[..., AsyncIterator[Any]]:
    async def logged(source: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        start_ns, answers = time.monotonic_ns(), 0
        async for response in call(source, context):
            answers += 1
            yield response
        logs.answered(rpc.about(context, b""), start_ns, answers)

    return logged


def _unary(
    answer: Callable[..., Awaitable[Any]], parse: Callable[[bytes], Any], rpc: Rpc
) -> Callable[..., Awaitable[Any]]:
    async def call(data: bytes, context: Context) -> Any:
        try:
            response = await answer(parse(data), context)
        except Exception as error:
            await _abort(context, error, rpc, data)
        except BaseException:  # the caller has gone
            rpc.ended("CANCELLED")
            raise
        rpc.ended("OK")
        return response

    return call


def _stream(
    answer: Callable[..., AsyncIterator[Any]],
    parse: Callable[[bytes], Any],
    rpc: Rpc,
    gate: Gate,
) -> Callable[..., Any]:
    async def call(source: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        try:
            with gate.requests(source, parse) as requests:
                async for response in answer(requests, context):
                    yield response
                if requests.is_cut:
                    raise Unavailable(STOPPING)
        except Exception as error:
            await _abort(context, error, rpc)
        except BaseException:  # the caller has gone
            rpc.ended("CANCELLED")
            raise
        rpc.ended("OK")

    return call


async def _abort(context: Context, error: Exception, rpc: Rpc, data: bytes = b"") -> NoReturn:
    """End an RPC with the status of what its servicer raised: the only place that does so."""
    code, details = to_status(error, lambda: rpc.about(context, data))
    rpc.ended(code.name)
    await context.abort(code, details, trailing_metadata(code, details, error))
    raise AssertionError("abort raises")
