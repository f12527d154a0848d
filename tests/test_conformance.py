"""The conformance command: a server that keeps every rule passes, and one that breaks a rule is reported for that."""

from __future__ import annotations

import json
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conformance_broken import BROKEN, Drifts, LosesIds, NeverRecovers, NotReady, NotServing, Random
from conformance_fake import MODEL, OUTPUTS, Fake, serving
from test_cli import command

from protos import open_inference as pb
from serving import wire
from serving.conformance import statistics
from serving.conformance.report import Verdict
from serving.conformance.rules import Group
from serving.conformance.suite import CHECKS, run

ROOT = Path(__file__).parents[1]
IDS = [check.id for check in CHECKS]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """The servers here count before they answer."""
    monkeypatch.setattr(statistics, "_SETTLE_S", 0.0)


def violations(fake: Fake) -> set[str]:
    with serving(fake) as address:
        return {result.id for result in run(address, MODEL).violations}


def matching(*patterns: str) -> set[str]:
    """The ids that the patterns stand for, every one of which must stand for some."""
    found = [{name for name in IDS if fnmatch(name, pattern)} for pattern in patterns]
    assert all(found), patterns
    return set().union(*found)


def test_ids_are_unique_and_every_check_names_its_rule():
    assert len(set(IDS)) == len(IDS)
    for check in CHECKS:
        assert check.rule
        documents = ("OIP", "GRPC", "gRPC", "Triton", "KServe")
        assert check.group is Group.ROBUSTNESS or check.rule.startswith(documents), check.id


def test_a_server_that_keeps_every_rule_passes_every_check():
    with serving(Fake()) as address:
        report = run(address)
    assert [result for result in report.results if result.verdict is not Verdict.PASS] == []
    assert (report.server, report.model, report.version) == ("fake 1.0", MODEL, "1")
    assert report.summary() == f"{len(CHECKS)} checks: {len(CHECKS)} passed, 0 violations, 0 not offered, 0 skipped"


def test_our_own_server_breaks_no_rule(served):
    report = run(served)
    assert report.violations == []
    offered = matching("stream.*", "config.*", "statistics.*", "repository.*", "classification.*", "grpc.*", "refuse.*")
    left_out = {result.id: result.reason for result in report.results if result.verdict is not Verdict.PASS}
    assert left_out.keys() & offered == {"refuse.missing-input", "refuse.malformed-bytes"}, left_out


def test_what_is_not_listed_may_be_left_out():
    class Bare(Fake):
        """The protocol, and nothing else."""

        extensions = ()
        missing = frozenset(pb.RPCS) - {"ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata"}
        missing -= {"ModelInfer"}

        def requested(self, request):
            for output in request.outputs:
                output.parameters.clear()
            return wire.requested_outputs(request, OUTPUTS)

    with serving(Bare()) as address:
        report = run(address, MODEL)
        with pytest.raises(
            ValueError, match="--model: needed, for this server gives no index of its models: UNIMPLEMENTED"
        ):
            run(address)
    assert report.violations == []
    verdicts = {result.id: result.verdict for result in report.results}
    optional = matching("stream.*", "config.*", "statistics.*", "repository.*", "classification.*", "*-memory.*")
    assert {name for name, verdict in verdicts.items() if verdict is Verdict.NOT_OFFERED} >= optional
    required = {check.id for check in CHECKS if check.group is Group.REQUIRED}
    assert all(verdicts[name] is Verdict.PASS for name in required)


# --- one rule broken at a time


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_rule_is_reported_and_no_other(broken):
    assert violations(broken()) == matching(*BROKEN[broken])


def test_every_check_can_fail():
    able = set().union(*(matching(*patterns) for patterns in BROKEN.values()))
    assert set(IDS) - able == {"infer.repeat"}  # whose server, below, breaks others with it


def test_a_server_that_changes_its_answers_is_reported():
    assert {"infer.repeat", "infer.typed", "stream.one"} <= violations(Drifts())


def test_a_model_that_draws_lots_breaks_no_rule():
    with serving(Random()) as address:
        report = run(address)
    assert report.violations == []
    skipped = {result.id: result.reason for result in report.results if result.verdict is Verdict.SKIPPED}
    assert skipped["infer.repeat"] == "this model answers the same request differently each time"
    assert "refuse.wrong-shape" not in skipped


def test_a_server_may_wait_for_a_model_that_failed_to_load():
    class Waits(NotReady, NotServing):
        def RepositoryIndex(self, request):
            answer = super().RepositoryIndex(request)
            answer.models.add(name="failed", version="1", state="UNAVAILABLE", reason="no such file")
            return pb.RepositoryIndexResponse(models=answer.models[:1]) if request.ready else answer

    with serving(Waits()) as address:
        report = run(address)
    assert report.violations == []
    skipped = {result.id for result in report.results if result.verdict is Verdict.SKIPPED}
    assert skipped == matching("server.ready", "grpc.health", "grpc.health.service", "grpc.health.watch")


def test_a_server_that_a_wrong_request_breaks_is_reported():
    with serving(NeverRecovers()) as address:
        results = {result.id: result for result in run(address).results}
    wanted = "afterwards, a valid request answered as before"
    assert results["refuse.too-few-bytes"].wanted == results["refuse.unknown-model"].wanted == wanted


# --- the command


def test_the_command_passes(tmp_path):
    with serving(Fake()) as address:
        done = command("serving", "conformance", address, "--json", tmp_path / "report.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{address}: fake 1.0, model {MODEL} version 1\nextensions: statistics, ")
    assert "  pass         server.live " in done.stdout
    assert done.stdout.endswith(f"{len(CHECKS)} passed, 0 violations, 0 not offered, 0 skipped\n")
    document = json.loads((tmp_path / "report.json").read_text())
    assert [result["id"] for result in document["results"]] == IDS
    assert (document["model"], document["summary"]) == (MODEL, done.stdout.splitlines()[-1])
    assert list(tmp_path.iterdir()) == [tmp_path / "report.json"]


def test_the_command_says_what_was_wanted_and_got():
    with serving(LosesIds()) as address:
        done = command("serving", "conformance", address, "--model", MODEL)
    assert done.returncode == 1
    assert (
        "  VIOLATION    infer.id                            OIP, Inference: id\n"
        "             wanted  id 'conformance-1'\n"
        "             got     ''\n"
    ) in done.stdout
    assert "6 violations (required 2, extension 4)" in done.stdout.splitlines()[-1]


def test_the_command_is_wrong():
    with serving(Fake()) as address:
        unknown = command("serving", "conformance", address, "--model", "cats")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: --model cats: NOT_FOUND: Request for unknown model: 'cats' is not found\n"
    nobody = command("serving", "conformance", "127.0.0.1:1")
    assert (nobody.returncode, nobody.stdout) == (2, "")
    assert nobody.stderr == "error: 127.0.0.1:1: no gRPC server answers in plain text there, within 5 s\n"


def test_it_needs_neither_torch_nor_onnxruntime():
    code = "import sys, serving.conformance.suite; print({'torch', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
