"""Checks of the model repository's RPCs that change nothing: loads and unloads name a model that is not there."""

from __future__ import annotations

import grpc

from protos import open_inference as pb
from serving.conformance.metadata import UNKNOWN_MODEL
from serving.conformance.probe import Probe
from serving.conformance.rules import Check, Group, Refused, Skipped, Violation, expect

_STATES = {"UNKNOWN", "READY", "UNAVAILABLE", "LOADING", "UNLOADING", ""}  # Triton: "" for a model never loaded


def _index(probe: Probe, ready: bool = False) -> list[pb.RepositoryIndexResponse.ModelIndex]:
    answer: pb.RepositoryIndexResponse = probe.call("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready))
    return list(answer.models)


def index(probe: Probe) -> None:
    names = sorted({entry.name for entry in _index(probe)})
    expect(probe.model in names, f"'{probe.model}' in the index", names)


def states(probe: Probe) -> None:
    entries = _index(probe)
    for entry in entries:
        expect(entry.state in _STATES, f"a state of {sorted(_STATES)} for '{entry.name}'", f"'{entry.state}'")
    got = {entry.state for entry in entries if entry.name == probe.model}
    expect("READY" in got, f"'{probe.model}', which answers, in the state READY", got)


def ready_index(probe: Probe) -> None:
    if not any(entry.state == "READY" for entry in _index(probe)):
        raise Skipped("the index has nothing in the state READY: see repository.states")
    entries = _index(probe, ready=True)
    others = {(entry.name, entry.version): entry.state for entry in entries if entry.state != "READY"}
    expect(not others, "only READY models when asked for those", others)
    expect(any(entry.name == probe.model for entry in entries), f"'{probe.model}' among the READY models", "no entry")


def load_unknown(probe: Probe) -> None:
    _fails_cleanly(probe, "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=UNKNOWN_MODEL))


def unload_unknown(probe: Probe) -> None:
    """Triton has nothing to unload then and says OK."""
    try:
        _fails_cleanly(probe, "RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=UNKNOWN_MODEL))
    except Violation as violation:
        if violation.got != "OK":
            raise


def unknown_repository(probe: Probe) -> None:
    """Whether it is UNIMPLEMENTED to name a repository or this one is unknown, nothing may be loaded."""
    probe.call("RepositoryIndex", pb.RepositoryIndexRequest())
    request = pb.RepositoryModelLoadRequest(repository_name="conformance-no-such-repository", model_name=UNKNOWN_MODEL)
    try:
        probe.call("RepositoryModelLoad", request)
    except Refused as error:
        expect(error.code is not grpc.StatusCode.UNKNOWN, "an error that says what is wrong", error)
    else:
        raise Violation("an error for a repository that is not there", "OK")


def _fails_cleanly(
    probe: Probe, rpc: str, request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest
) -> None:
    """An error of any kind but UNKNOWN (Triton's own are INTERNAL and UNAVAILABLE), and the model is still there."""
    try:
        probe.call(rpc, request)
    except Refused as error:
        if error.code is grpc.StatusCode.UNIMPLEMENTED:
            raise
        expect(error.code is not grpc.StatusCode.UNKNOWN, "an error that says what is wrong", error)
    else:
        raise Violation("an error for a model that is not there", "OK")
    answer: pb.ModelReadyResponse = probe.call("ModelReady", pb.ModelReadyRequest(name=probe.model))
    expect(answer.ready, f"'{probe.model}' as ready as before", "ready: false")


_RULE = "Triton, Model Repository extension"

CHECKS = [
    Check(f"repository.{name}", Group.EXTENSION, f"{_RULE}: {section}", run, "model_repository")
    for name, section, run in (
        ("index", "Index", index),
        ("states", "Index, state", states),
        ("index.ready", "Index, ready", ready_index),
        ("load.unknown-model", "Load", load_unknown),
        ("load.unknown-repository", "Load, repository_name", unknown_repository),
        ("unload.unknown-model", "Unload", unload_unknown),
    )
]
