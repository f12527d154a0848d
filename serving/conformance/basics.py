"""Checks of what gRPC itself has services for: health, reflection; and of its limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from protos import open_inference as pb
from serving.conformance.probe import CALL_S, Probe
from serving.conformance.refusals import INVALID_ARGUMENT, still_answers
from serving.conformance.rules import Check, Group, NotOffered, Refused, Violation, answered, expect, refused

_UNKNOWN_SERVICE = "conformance.NoSuchService"
_LARGE_BYTES = 5 << 20  # more than the 4 MiB that gRPC's libraries take unless they are told otherwise

_Status = health_pb2.HealthCheckResponse


def _health(probe: Probe, service: str) -> Any:
    check = probe.channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=_Status.FromString,
    )
    return answered(lambda: check(health_pb2.HealthCheckRequest(service=service), timeout=CALL_S))


def health(probe: Probe) -> None:
    _expect_status(probe, "", _health(probe, "").status, _Status.SERVING)


def service_health(probe: Probe) -> None:
    _expect_status(probe, pb.SERVICE, _health(probe, pb.SERVICE).status, _Status.SERVING)


def _expect_status(probe: Probe, service: str, got: int, wanted: int) -> None:
    if (got, wanted) == (_Status.NOT_SERVING, _Status.SERVING):
        probe.excused()
    name = _Status.ServingStatus.Name
    expect(got == wanted, f"{name(wanted)} for '{service}'", name(got))


def unknown_health(probe: Probe) -> None:
    _health(probe, "")
    refused(lambda: _health(probe, _UNKNOWN_SERVICE), grpc.StatusCode.NOT_FOUND)


def watch(probe: Probe) -> None:
    """The first message comes at once; for a service that is unknown it says so and the stream stays open."""
    for service, wanted in (("", _Status.SERVING), (_UNKNOWN_SERVICE, _Status.SERVICE_UNKNOWN)):
        call = probe.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=_Status.FromString,
        )(health_pb2.HealthCheckRequest(service=service), timeout=CALL_S)
        status = answered(lambda call=call: next(call)).status  # type: ignore[misc]  # bound now, called now
        call.cancel()
        _expect_status(probe, service, status, wanted)


def _reflect(probe: Probe, *requests: Any) -> list[Any]:
    """The answers of the reflection service, of whichever version there is."""
    missing: Refused | None = None
    for version in ("v1", "v1alpha"):  # the same messages
        send = probe.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        try:
            return answered(lambda send=send: list(send(iter(requests), timeout=CALL_S)))  # type: ignore[misc]
        except Refused as error:
            if error.code is not grpc.StatusCode.UNIMPLEMENTED:
                raise
            missing = error
    raise NotOffered(f"no reflection ({missing})")


def reflection(probe: Probe) -> None:
    (answer,) = _reflect(probe, reflection_pb2.ServerReflectionRequest(list_services=""))
    names = sorted(service.name for service in answer.list_services_response.service)
    expect(pb.SERVICE in names, f"{pb.SERVICE} among the services", names)


def field_numbers(probe: Probe) -> None:
    """The server's own descriptors have the protocol's names, numbers and types."""
    pool = descriptor_pool.DescriptorPool()
    _add_files(probe, pool, reflection_pb2.ServerReflectionRequest(file_containing_symbol=pb.SERVICE), set())
    service = pool.FindServiceByName(pb.SERVICE)
    differences: list[str] = []
    for method in service.methods:
        if method.name in pb.RPCS:
            rpc = pb.RPCS[method.name]
            differences += _differences(rpc.request.DESCRIPTOR, method.input_type)
            differences += _differences(rpc.response.DESCRIPTOR, method.output_type)
    expect(not differences, "the protocol's fields", "; ".join(sorted(set(differences))))


def _add_files(probe: Probe, pool: descriptor_pool.DescriptorPool, request: Any, added: set[str]) -> None:
    """Add the file that is asked for, those that it imports before it."""
    (answer,) = _reflect(probe, request)
    protos = answer.file_descriptor_response.file_descriptor_proto
    if not protos:
        raise Violation(f"descriptors for {request}".strip(), answer.error_response.error_message or "none")
    files = [descriptor_pb2.FileDescriptorProto.FromString(data) for data in protos]
    waiting = {file.name: file for file in files}

    def add(file: descriptor_pb2.FileDescriptorProto) -> None:
        if file.name in added:
            return
        added.add(file.name)
        for name in file.dependency:
            if name in waiting:
                add(waiting[name])
            elif name not in added:
                _add_files(probe, pool, reflection_pb2.ServerReflectionRequest(file_by_filename=name), added)
        pool.Add(file)

    for file in files:
        add(file)


def _differences(ours: Any, theirs: Any) -> Iterator[str]:
    """Where a number stands for something else; a field that only one of the two messages has is none."""
    if ours.full_name != theirs.full_name:
        yield f"{theirs.full_name} in place of {ours.full_name}"
        return
    for number, field in ours.fields_by_number.items():
        other = theirs.fields_by_number.get(number)
        if other is None:
            continue
        if (field.name, field.type) != (other.name, other.type):
            yield f"{ours.name}: {other.name} = {number} in place of {field.name} = {number}"
        elif field.message_type is not None:
            yield from _differences(field.message_type, other.message_type)


def unknown_method(probe: Probe) -> None:
    send: Callable[..., bytes] = probe.channel.unary_unary(f"/{pb.SERVICE}/ConformanceNoSuchMethod")
    refused(lambda: answered(lambda: send(b"", timeout=CALL_S)), grpc.StatusCode.UNIMPLEMENTED)


def large_message(probe: Probe) -> None:
    """5 MiB, in a parameter that means nothing: taken, or refused in words."""
    request = probe.request()
    request.parameters["conformance_padding"].string_param = "x" * _LARGE_BYTES
    try:
        probe.infer(request)
    except Refused as error:
        expect(
            error.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, INVALID_ARGUMENT),
            "OK, RESOURCE_EXHAUSTED or INVALID_ARGUMENT for a message of 5 MiB",
            error,
        )
    still_answers(probe)


_HEALTH = "GRPC Health Checking Protocol"
_REFLECTION = "GRPC Server Reflection Protocol"

CHECKS = [
    Check("grpc.health", Group.GRPC, f"{_HEALTH}: Check", health),
    Check("grpc.health.service", Group.GRPC, f"{_HEALTH}: Check, a service by name", service_health),
    Check("grpc.health.unknown", Group.GRPC, f"{_HEALTH}: Check, NOT_FOUND", unknown_health),
    Check("grpc.health.watch", Group.GRPC, f"{_HEALTH}: Watch", watch),
    Check("grpc.reflection", Group.GRPC, f"{_REFLECTION}: list_services", reflection),
    Check("grpc.reflection.fields", Group.GRPC, "OIP and Triton, the field numbers", field_numbers),
    Check("grpc.unknown-method", Group.GRPC, "gRPC status codes: UNIMPLEMENTED", unknown_method),
    Check("grpc.large-message", Group.GRPC, "gRPC status codes: RESOURCE_EXHAUSTED", large_message),
]
