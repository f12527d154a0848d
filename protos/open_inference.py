"""The Open Inference Protocol's messages and RPCs, from `open_inference.proto`.

Every generated module registers its messages in protobuf's one default pool, and Triton's client registers the same
names there, so that importing it beside another server's code fails: `duplicate symbol 'inference.ServerLiveRequest'`.
These messages therefore live in a pool of their own. `make protos` writes the descriptors and the types; the classes
are built here, by the same C implementation as any others.

Messages and enums are attributes of this module, as they would be of a generated one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal import enum_type_wrapper
from google.protobuf.message import Message

if TYPE_CHECKING:
    from protos.open_inference_pb2 import *  # noqa: F403  # the types of what `_publish` adds

SERVICE = "inference.GRPCInferenceService"
POOL = descriptor_pool.DescriptorPool()


class Rpc(NamedTuple):
    """One method of the service, with what a server needs to register it and a client to call it."""

    name: str
    path: str  # `/inference.GRPCInferenceService/ModelInfer`
    request: type[Message]
    response: type[Message]
    request_streaming: bool
    response_streaming: bool


def _publish() -> None:
    """Put the file into the pool, and its messages and enums, with their values, into this module."""
    files = descriptor_pb2.FileDescriptorSet.FromString(Path(__file__).with_suffix(".binpb").read_bytes())
    for file in files.file:
        POOL.Add(file)
        descriptor = POOL.FindFileByName(file.name)
        for name, message in descriptor.message_types_by_name.items():
            globals()[name] = message_factory.GetMessageClass(message)
        for name, enum in descriptor.enum_types_by_name.items():
            globals()[name] = enum_type_wrapper.EnumTypeWrapper(enum)
            globals().update(enum_type_wrapper.EnumTypeWrapper(enum).items())


def _rpcs() -> dict[str, Rpc]:
    return {
        method.name: Rpc(
            name=method.name,
            path=f"/{SERVICE}/{method.name}",
            request=message_factory.GetMessageClass(method.input_type),
            response=message_factory.GetMessageClass(method.output_type),
            request_streaming=method.client_streaming,
            response_streaming=method.server_streaming,
        )
        for method in POOL.FindServiceByName(SERVICE).methods
    }


_publish()
RPCS = _rpcs()  # by name, in the order of the file
