"""Checks of the server's and the model's health and metadata."""

from __future__ import annotations

import grpc

from protos import open_inference as pb
from serving.conformance.probe import Probe
from serving.conformance.rules import Check, Group, Refused, Skipped, expect, refused
from serving.tensors import DATATYPES, shape_text

UNKNOWN_MODEL = "conformance-no-such-model"
UNKNOWN_VERSION = "987654321"

NOT_FOUND = grpc.StatusCode.NOT_FOUND


def live(probe: Probe) -> None:
    answer: pb.ServerLiveResponse = probe.call("ServerLive", pb.ServerLiveRequest())
    expect(answer.live, "live: true", "live: false")


def ready(probe: Probe) -> None:
    answer: pb.ServerReadyResponse = probe.call("ServerReady", pb.ServerReadyRequest())
    if not answer.ready:
        probe.excused()
    expect(answer.ready, "ready: true of a server that answers requests", "ready: false")


def server_metadata(probe: Probe) -> None:
    answer: pb.ServerMetadataResponse = probe.call("ServerMetadata", pb.ServerMetadataRequest())
    expect(bool(answer.name), "the server's name", "an empty name")
    expect(bool(answer.version), "the server's version", "an empty version")


def model_ready(probe: Probe) -> None:
    answer: pb.ModelReadyResponse = probe.call("ModelReady", pb.ModelReadyRequest(name=probe.model))
    expect(answer.ready, "ready: true of a model that answers requests", "ready: false")


def model_ready_version(probe: Probe) -> None:
    for version in _versions(probe):
        answer: pb.ModelReadyResponse = probe.call(
            "ModelReady", pb.ModelReadyRequest(name=probe.model, version=version)
        )
        expect(answer.ready, f"ready: true of version {version}, which ModelMetadata lists", "ready: false")


def _not_ready(probe: Probe, request: pb.ModelReadyRequest) -> None:
    wanted = "ready: false, or NOT_FOUND"
    try:
        answer: pb.ModelReadyResponse = probe.call("ModelReady", request)
    except Refused as error:
        expect(error.code is NOT_FOUND, wanted, error)
    else:
        expect(not answer.ready, wanted, "ready: true")


def unknown_model_ready(probe: Probe) -> None:
    _not_ready(probe, pb.ModelReadyRequest(name=UNKNOWN_MODEL))


def unknown_version_ready(probe: Probe) -> None:
    _not_ready(probe, pb.ModelReadyRequest(name=probe.model, version=UNKNOWN_VERSION))


def model_metadata(probe: Probe) -> None:
    answer: pb.ModelMetadataResponse = probe.call("ModelMetadata", pb.ModelMetadataRequest(name=probe.model))
    expect(answer.name == probe.model, f"name '{probe.model}'", f"'{answer.name}'")
    for role, tensors in (("inputs", answer.inputs), ("outputs", answer.outputs)):
        names = [tensor.name for tensor in tensors]
        expect(bool(names), f"the model's {role}", "none")
        expect(all(names) and len(set(names)) == len(names), f"{role} with names of their own", names)


def metadata_version(probe: Probe) -> None:
    for version in _versions(probe):
        answer: pb.ModelMetadataResponse = probe.call(
            "ModelMetadata", pb.ModelMetadataRequest(name=probe.model, version=version)
        )
        expect(answer.name == probe.model, f"name '{probe.model}' for version {version}", f"'{answer.name}'")
        expect(version in answer.versions, f"version {version} among the versions", list(answer.versions))


def datatypes(probe: Probe) -> None:
    for tensor in _tensors(probe):
        expect(tensor.datatype in DATATYPES, f"a datatype of the protocol for '{tensor.name}'", f"'{tensor.datatype}'")


def shapes(probe: Probe) -> None:
    for tensor in _tensors(probe):
        good = all(axis == -1 or axis >= 0 for axis in tensor.shape)
        expect(good, f"lengths, or -1 for any, as the shape of '{tensor.name}'", shape_text(tuple(tensor.shape)))


def _tensors(probe: Probe) -> list[pb.ModelMetadataResponse.TensorMetadata]:
    tensors = [*probe.metadata.inputs, *probe.metadata.outputs]
    if not tensors:
        raise Skipped("ModelMetadata names no tensors")
    return tensors


def _versions(probe: Probe) -> list[str]:
    if not probe.metadata.versions:
        raise Skipped("ModelMetadata lists no versions")
    return list(probe.metadata.versions)


def unknown_model_metadata(probe: Probe) -> None:
    refused(lambda: probe.call("ModelMetadata", pb.ModelMetadataRequest(name=UNKNOWN_MODEL)), NOT_FOUND)


def unknown_version_metadata(probe: Probe) -> None:
    request = pb.ModelMetadataRequest(name=probe.model, version=UNKNOWN_VERSION)
    refused(lambda: probe.call("ModelMetadata", request), NOT_FOUND)


_CODES = "google.rpc.Code: NOT_FOUND"

CHECKS = [
    Check("server.live", Group.REQUIRED, "OIP, Server Live", live),
    Check("server.ready", Group.REQUIRED, "OIP, Server Ready", ready),
    Check("server.metadata", Group.REQUIRED, "OIP, Server Metadata", server_metadata),
    Check("model.ready", Group.REQUIRED, "OIP, Model Ready", model_ready),
    Check("model.ready.version", Group.REQUIRED, "OIP, Model Ready: version", model_ready_version),
    Check("model.ready.unknown-model", Group.REQUIRED, "OIP, Model Ready: false if not ready", unknown_model_ready),
    Check("model.ready.unknown-version", Group.REQUIRED, "OIP, Model Ready: false if not ready", unknown_version_ready),
    Check("metadata.answer", Group.REQUIRED, "OIP, Model Metadata: name, inputs, outputs", model_metadata),
    Check("metadata.version", Group.REQUIRED, "OIP, Model Metadata: version, versions", metadata_version),
    Check("metadata.datatypes", Group.REQUIRED, "OIP, Tensor Data Types", datatypes),
    Check("metadata.shapes", Group.REQUIRED, "OIP, Model Metadata: shape", shapes),
    Check("metadata.unknown-model", Group.REQUIRED, f"OIP, Model Metadata; {_CODES}", unknown_model_metadata),
    Check("metadata.unknown-version", Group.REQUIRED, f"OIP, Model Metadata; {_CODES}", unknown_version_metadata),
]
