"""The gRPC services: each decodes a request, asks the repository and its scheduler, and encodes the answer.

A servicer is a class with one method for each RPC, which takes and gives messages and raises the errors of
`serving.errors`. `handler` makes it callable over gRPC.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from serving import errors
from serving.errors import InvalidArgument
from serving.repository import Repository, ServedModel
from serving.scheduler import Closed
from serving.statistics import Stages

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request")
Answer = TypeVar("Answer")

STREAM_IN_FLIGHT = 64  # requests of one stream that run at once; a client that sends more waits


def handler(servicer: object, service: ServiceDescriptor) -> grpc.GenericRpcHandler:
    """The RPCs of a service, answered by the methods of the same names.

    Messages are parsed here and not by gRPC, which would answer INTERNAL to one that cannot be parsed.
    """
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in service.methods:
        request = message_factory.GetMessageClass(method.input_type)
        answer = getattr(servicer, method.name)
        if method.server_streaming:
            methods[method.name] = grpc.stream_stream_rpc_method_handler(
                _stream(answer, request), response_serializer=_serialize
            )
        else:
            methods[method.name] = grpc.unary_unary_rpc_method_handler(
                _unary(answer, request), response_serializer=_serialize
            )
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def deadline(context: Context) -> float | None:
    """When the caller stops waiting, in `time.monotonic()` seconds."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


async def in_order(
    requests: AsyncIterator[Request], answer: Callable[[Request], Coroutine[Any, Any, Answer]]
) -> AsyncIterator[Answer]:
    """Answer a stream's requests concurrently, and give the answers in the order of the requests.

    `answer` raises nothing: an error that must not end the stream is an answer too.
    """
    running: asyncio.Queue[asyncio.Task[Answer] | None] = asyncio.Queue(STREAM_IN_FLIGHT)

    async def read() -> None:
        try:
            async for request in requests:
                task = asyncio.create_task(answer(request))
                try:
                    await running.put(task)
                except asyncio.CancelledError:
                    task.cancel()
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


def _parse(request: type[Message], data: bytes) -> Any:
    try:
        return request.FromString(data)
    except DecodeError as error:
        raise InvalidArgument(f"{len(data)} bytes that are not a {request.DESCRIPTOR.full_name}: {error}") from error


def _unary(answer: Callable[..., Awaitable[Any]], request: type[Message]) -> Callable[..., Awaitable[Any]]:
    async def call(data: bytes, context: Context) -> Any:
        try:
            return await answer(_parse(request, data), context)
        except Exception as error:
            await _abort(context, error)

    return call


def _stream(answer: Callable[..., AsyncIterator[Any]], request: type[Message]) -> Callable[..., AsyncIterator[Any]]:
    async def call(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        try:
            async for response in answer((_parse(request, data) async for data in requests), context):
                yield response
        except Exception as error:
            await _abort(context, error)

    return call


async def _abort(context: Context, error: Exception) -> None:
    """End an RPC with the status of `error`: the only place that does so."""
    code, details = errors.to_status(error)
    await context.abort(code, details)
