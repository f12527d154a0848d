"""Checks of shared memory, trace and log settings, without changing any: they are read, and unknown names are used."""

from __future__ import annotations

import grpc

from protos import open_inference as pb
from serving.conformance.probe import Probe
from serving.conformance.refusals import INVALID_ARGUMENT, NOT_FOUND, still_answers
from serving.conformance.rules import Check, Group, Refused, Skipped, expect, refused

UNKNOWN_REGION = "conformance-no-such-region"


def system_status(probe: Probe) -> None:
    probe.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest())


def cuda_status(probe: Probe) -> None:
    probe.call("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest())


def system_unregister(probe: Probe) -> None:
    """An unknown region, then all of them, where there are none: load generators start so."""
    _unregisters(probe, "SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name=UNKNOWN_REGION))
    if probe.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()).regions:
        raise Skipped("regions of other clients are registered, and stay so")
    probe.call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest())


def cuda_unregister(probe: Probe) -> None:
    """As `system_unregister`."""
    _unregisters(probe, "CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest(name=UNKNOWN_REGION))
    if probe.call("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest()).regions:
        raise Skipped("regions of other clients are registered, and stay so")
    probe.call("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest())


def _unregisters(
    probe: Probe,
    rpc: str,
    request: pb.SystemSharedMemoryUnregisterRequest | pb.CudaSharedMemoryUnregisterRequest,
) -> None:
    try:
        probe.call(rpc, request)
    except Refused as error:
        if error.code is grpc.StatusCode.UNIMPLEMENTED:
            raise
        expect(error.code is NOT_FOUND, "OK or NOT_FOUND for a region that is not there", error)


def unknown_region(probe: Probe) -> None:
    """An input in a region that nobody registered."""
    probe.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest())
    request = probe.request()
    tensor = request.inputs[0]
    tensor.parameters["shared_memory_region"].string_param = UNKNOWN_REGION
    tensor.parameters["shared_memory_byte_size"].int64_param = len(request.raw_input_contents[0])
    del request.raw_input_contents[0]
    refused(lambda: probe.infer(request), NOT_FOUND, INVALID_ARGUMENT)
    still_answers(probe)


def trace(probe: Probe) -> None:
    probe.call("TraceSetting", pb.TraceSettingRequest())


def logging(probe: Probe) -> None:
    """Each setting has a value in a type of its own."""
    answer: pb.LogSettingsResponse = probe.call("LogSettings", pb.LogSettingsRequest())
    for name, value in answer.settings.items():
        expect(value.WhichOneof("parameter_choice") is not None, f"a value for '{name}'", "none")


_SYSTEM, _CUDA = "system_shared_memory", "cuda_shared_memory"
_RULE = "Triton, Shared-Memory extension"

CHECKS = [
    Check("shared-memory.system.status", Group.EXTENSION, f"{_RULE}: System, Status", system_status, _SYSTEM),
    Check(
        "shared-memory.system.unregister", Group.EXTENSION, f"{_RULE}: System, Unregister", system_unregister, _SYSTEM
    ),
    Check("shared-memory.system.unknown", Group.EXTENSION, f"{_RULE}: shared_memory_region", unknown_region, _SYSTEM),
    Check("shared-memory.cuda.status", Group.EXTENSION, f"{_RULE}: CUDA, Status", cuda_status, _CUDA),
    Check("shared-memory.cuda.unregister", Group.EXTENSION, f"{_RULE}: CUDA, Unregister", cuda_unregister, _CUDA),
    Check("trace.read", Group.EXTENSION, "Triton, Trace extension", trace, "trace"),
    Check("logging.read", Group.EXTENSION, "Triton, Logging extension", logging, "logging"),
]
