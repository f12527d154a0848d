"""The measurements measure: a wrong, refused or lost request is no success, and each script ends with its figures."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import hpack
import numpy as np
import pytest
from conftest import MODEL, running

from benchmarks import load as loads
from benchmarks import machine, overload, peers, plot, report, serving, soak
from benchmarks.calls import ask
from benchmarks.contenders import BOUND, OURS
from benchmarks.driver import UNARY, Driver, Load
from benchmarks.exchanges import Exchange, infer_request, random_inputs
from benchmarks.headers import call_blocks, status_of
from benchmarks.http2 import ACK, HEADERS, INITIAL_WINDOW_SIZE, SETTINGS, frame
from benchmarks.load import Latency, Result, learn, line, run_load
from benchmarks.sampling import Sample, memory_slope, more_open_files
from protos import open_inference as pb
from serving.tensors import TensorSpec

BRIEF = {"seconds": 0.5, "warmup_s": 0.1, "in_flight": 8, "connections": 2}
INPUTS = (TensorSpec(name="image", datatype="UINT8", shape=("batch", 1, 28, 28)),)


def exchanges(target, images=1):
    return asyncio.run(learn(target, MODEL, images, count=4))


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
@pytest.mark.parametrize("images", [1, 200])  # 200 images do not fit into one frame, nor into the first window
def test_right_answers_count(served, stream, images):
    load = Load(served, exchanges(served, images), images=images, stream=stream, **BRIEF)
    result = run_load(load)
    assert result.statuses.keys() == {"OK"}, result.messages
    assert result.failed == 0
    assert result.requests_per_s == result.statuses["OK"] / load.seconds
    assert result.images_per_s == result.requests_per_s * images
    assert 0 < result.ok.p50 <= result.ok.p90 <= result.ok.p99 <= result.ok.p999 <= result.ok.max
    assert 0 < result.ok.mean <= result.ok.max
    assert math.isnan(result.refused.mean)
    assert result.sent_bytes > result.statuses["OK"] * images * 28 * 28 * 0.5
    assert result.cpu_s > 0
    assert f"OK {result.statuses['OK']}" in line(load, result)


@pytest.mark.parametrize("stream", [False, True], ids=["unary", "stream"])
def test_a_wrong_answer_is_no_success(served, stream):
    right = exchanges(served)
    wrong = replace(right[0], expected={name: array + 1 for name, array in right[0].expected.items()})
    result = run_load(Load(served, (wrong,), stream=stream, **BRIEF))
    assert result.statuses.keys() == {"WRONG"}
    assert result.requests_per_s == 0
    assert result.failed == result.statuses["WRONG"] > 0
    assert math.isnan(result.ok.mean)


def test_an_answer_to_another_request_is_wrong(served):
    first, second, *_ = exchanges(served)
    result = run_load(Load(served, (first, replace(second, request=first.request)), **BRIEF))
    assert result.statuses.keys() == {"OK", "WRONG"}


@pytest.mark.parametrize(("stream", "status"), [(False, "RESOURCE_EXHAUSTED"), (True, "STREAM_ERROR")])
def test_a_refused_request_is_no_success(repository, stream, status):
    with running(repository, max_queue=1) as server:
        load = Load(server.address, exchanges(server.address), stream=stream, **BRIEF)
        result = run_load(load)
    assert result.failed >= result.statuses[status] > 0  # gRPC itself may refuse others
    assert result.failed == sum(result.statuses.values()) - result.statuses.get("OK", 0)
    assert "the queue holds no more" in result.messages[status]
    assert result.requests_per_s == result.statuses.get("OK", 0) / load.seconds
    assert result.refused.mean > 0


def test_an_open_loop_sends_what_is_due(served):
    load = Load(served, exchanges(served), rate=200, **BRIEF)
    result = run_load(load)
    assert sum(result.statuses.values()) == pytest.approx(load.rate * load.seconds, abs=2)
    assert result.statuses.keys() == {"OK"}
    assert result.lag_p99_ms >= 0


def test_several_processes_share_a_load(served):
    result = run_load(Load(served, exchanges(served), **BRIEF), processes=2)
    assert result.statuses.keys() == {"OK"}


def test_a_server_may_limit_streams_and_send_its_clients_away():
    """Half as many streams as are wanted, and GOAWAY after a tenth of a second: no request is lost."""
    infer = grpc.unary_unary_rpc_method_handler(lambda request, context: b"answer")
    handler = grpc.method_handlers_generic_handler(pb.SERVICE, {"ModelInfer": infer})
    options = [("grpc.max_concurrent_streams", 4), ("grpc.max_connection_age_ms", 100)]
    server = grpc.server(ThreadPoolExecutor(4), options=options)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        result = run_load(Load(f"127.0.0.1:{port}", (Exchange(b"x" * 100_000),), **BRIEF | {"in_flight": 16}))
    finally:
        server.stop(None).wait()
    assert result.statuses.keys() == {"OK"}, result.messages


@pytest.mark.parametrize("rate", [None, 50.0], ids=["closed", "open"])
def test_a_lost_connection_is_no_success(rate):
    """A server that takes requests and hangs up."""

    served = []

    async def hang_up(reader, writer):
        served.append(asyncio.current_task())
        writer.write(frame(SETTINGS, 0, 0, INITIAL_WINDOW_SIZE.to_bytes(2, "big") + (1 << 20).to_bytes(4, "big")))
        received = b""
        with contextlib.suppress(OSError):  # the client may be the first to hang up
            while b"a request" not in received and (more := await reader.read(1 << 16)):
                received += more
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    async def measure():
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            load = Load(f"127.0.0.1:{port}", (Exchange(b"a request"),), rate=rate, **BRIEF)
            record = await Driver(load).run(None)
            await asyncio.gather(*served)
            return record

    record = asyncio.run(measure())
    assert record.samples.keys() == {"CONNECTION_LOST"}
    assert len(record.samples["CONNECTION_LOST"]) > 1  # it connected anew


def test_no_server_is_an_error_and_not_a_result(capsys):
    assert loads.main(["--target", "127.0.0.1:1"]) == 2
    assert "error: " in capsys.readouterr().err


def test_the_command_prints_and_writes_the_result(served, tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--target", served, "--model", MODEL, "--seconds", "0.3", "--warmup", "0.1", "--json", str(path)]
    assert loads.main(arguments) == 0
    assert "requests/s" in capsys.readouterr().out
    assert json.loads(path.read_text())["requests_per_s"] > 0
    assert loads.main(["--target", served, "--model", "no-such-model"]) == 2
    assert "NOT_FOUND" in capsys.readouterr().err


def test_one_call_by_itself(served):
    with pytest.raises(ValueError, match="INVALID_ARGUMENT"):
        asyncio.run(ask(served, UNARY, b"\xff"))


def test_later_calls_are_indices_into_the_servers_table():
    decoder = hpack.Decoder()
    first, later = call_blocks("host:1", "/a/b", [("authorization", "x" * 300)], 4096)
    assert decoder.decode(first) == decoder.decode(later)
    assert dict(decoder.decode(later))["authorization"] == "x" * 300
    assert len(later) < 10
    assert len(set(call_blocks("host:1", "/a/b", [], 0))) == 1  # no table: in full every time


def test_a_status_that_is_missing_or_escaped():
    encode = hpack.Encoder().encode
    assert status_of(encode([(":status", "200")])).name == "UNKNOWN"
    status = status_of(encode([("grpc-status", "8"), ("grpc-message", "queue%20full")]))
    assert (status.name, status.message) == ("RESOURCE_EXHAUSTED", "queue full")
    assert HEADERS == ACK == 1


def test_latency_is_in_milliseconds():
    latency = Latency.of(np.array(array("d", [0.001, 0.003])))
    assert (latency.mean, latency.max) == (2.0, 3.0)


def test_memory_and_files_that_grow_are_seen():
    flat = [Sample(second, 100.0, 20 + second % 2) for second in range(60)]
    grows = [Sample(second, 100 + second / 30, 20 + second // 10) for second in range(60)]
    assert memory_slope(flat) == pytest.approx(0, abs=1e-6)
    assert memory_slope(grows) == pytest.approx(2)
    assert more_open_files(flat) == 0
    assert more_open_files(grows) == 4
    with pytest.raises(ValueError, match="got 1 samples"):
        memory_slope(flat[:1])


def test_what_a_host_kept_is_a_share_of_all_cores(monkeypatch):
    now_s, kept_s = 100.0, 7.0
    monkeypatch.setattr(machine.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "_stolen_s", lambda: kept_s)
    stolen = machine.Stolen()
    now_s, kept_s = 110.0, 17.0  # ten seconds of four cores, and ten of them were kept
    assert stolen.share() == 0.25


@pytest.mark.parametrize(("tool", "more"), [(report, []), (plot, ["figures.png"])])
def test_figures_that_are_not_there_are_told(tool, more, tmp_path, capsys):
    assert tool.main([str(tmp_path / "none.json"), *more]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def overloaded(**changes):
    fields = {
        "requests_per_s": 100.0,
        "images_per_s": 100.0,
        "ok": Latency(p99=50.0),
        "refused": Latency(p99=5.0),
        "statuses": {"OK": 1000, "RESOURCE_EXHAUSTED": 1000},
        "messages": {},
        "sent_bytes": 0,
        "received_bytes": 0,
        "cpu_s": 0.0,
        "watched_cpu_s": 0.0,
        "lag_p99_ms": 1.0,
    }
    return Result(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "growth_mb", "failing"),
    [
        ({}, 0, None),
        ({"statuses": {"OK": 1000, "RESOURCE_EXHAUSTED": 500}}, 0, 0),
        ({"ok": Latency(p99=101.0)}, 0, 1),
        ({"ok": Latency()}, 0, 1),
        ({"statuses": {"OK": 1000, "RESOURCE_EXHAUSTED": 999, "UNAVAILABLE": 1}}, 0, 2),
        ({"statuses": {"OK": 2000}}, 0, 2),
        ({"refused": Latency(p99=11.0)}, 0, 3),
        ({}, 6, 4),
        ({"requests_per_s": 89.0}, 0, 5),
    ],
)
def test_each_demand_under_overload_can_fail(changes, growth_mb, failing):
    checks = overload.judge(overloaded(**changes), peak=100, after=100, seconds=10, growth_mb=growth_mb, bound_ms=100)
    assert [place for place, check in enumerate(checks) if not check.passed] == ([] if failing is None else [failing])


TWO_WORKERS = pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections over processes")


@pytest.mark.parametrize("more", [[], pytest.param(["--workers=2"], marks=TWO_WORKERS)])
def test_overload(repository, tmp_path, more):
    path = tmp_path / "overload.json"
    arguments = [*more, "--repository", str(repository), "--model", MODEL, "--seconds", "2", "--peak-seconds", "0.3"]
    code = overload.main([*arguments, "--warmup", "0.1", "--json", str(path)])
    written = json.loads(path.read_text())
    assert code == (0 if all(check["passed"] for check in written["checks"]) else 1)
    assert len(written["checks"]) == 6
    assert written["peak_requests_per_s"] > 0
    assert written["peak_after_requests_per_s"] > 0
    assert 0 <= written["stolen_at_peak"] < 1
    assert 0 <= written["stolen_since"] < 1
    assert written["statuses"]["OK"] > 0
    assert "WRONG" not in written["statuses"]
    assert list(written["model_us_per_image"]) == ["before", "meanwhile", "after"]
    assert all(0 < us < 1e5 for us in written["model_us_per_image"].values())


@pytest.mark.parametrize(("most", "code"), [("1e9", 0), ("-1e9", 1)])
def test_soak(repository, tmp_path, most, code):
    path = tmp_path / "soak.json"
    arguments = ["--repository", str(repository), "--model", MODEL, "--seconds", "3", f"--most-mb-per-min={most}"]
    ended = soak.main([*arguments, "--json", str(path)])
    written = json.loads(path.read_text())
    assert written["problems"] == {}
    assert len(written["done"]) == 7
    assert len(written["samples"]) > 10
    assert all(sample["rss_mb"] > 10 and sample["open_files"] > 5 for sample in written["samples"])
    assert ended == (code if written["more_open_files"] <= soak.MOST_MORE_FILES else 1)


def test_soak_of_one_part(repository, capsys):
    arguments = ["--repository", str(repository), "--model", MODEL, "--seconds", "1", "--most-mb-per-min=1e9"]
    assert soak.main([*arguments, "--only", "raw pictures"]) == 0
    printed = capsys.readouterr().out
    assert "raw pictures" in printed
    assert "unary tensors" not in printed


@pytest.fixture(scope="module")
def figures(repository, tmp_path_factory):
    path = tmp_path_factory.mktemp("figures") / "serving.json"
    sizes = ["--images", "1", "4", "--in-flight", "1", "32", "--rounds", "1", "--seconds", "0.5", "--warmup", "0.1"]
    arguments = ["--repository", str(repository), "--model", MODEL, *sizes, "--idle", "0.2", "--json", str(path)]
    assert serving.main(arguments) == 0
    return path


def test_serving_measures_every_case(figures):
    written = json.loads(figures.read_text())
    assert len(written["rows"]) == 2 * 2 * 2 * 2  # servers, images, modes, in flight
    for row in written["rows"]:
        assert row["requests_per_s"] > 0
        assert row["images_per_s"] == pytest.approx(row["requests_per_s"] * row["images"])
        assert row["mean_ms"] > 0
        assert row["cpu_us_per_request"] > 0
        assert row["statuses"].keys() == {"OK"}
        assert (row["ratio_to_bound"] == 1) == (row["server"] == BOUND)
        assert (row["mean_batch"] is None) == (row["server"] == BOUND)
    assert report.find(written, OURS, 1, 1)["mean_batch"] == 1
    assert {one["images"] for one in written["inprocess"]} == {1, 4}
    for server in written["servers"].values():
        assert server["ready_s"] > 0
        assert min(*server["rss_mb"], *server["rss_mb_after"]) > 10


def test_the_report_goes_between_its_markers(figures, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        assert report.main([str(figures), "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count("### Targets") == text.count("### Unary") == text.count("### Streamed") == 1
    row = report.find(json.loads(figures.read_text()), OURS, 4, 32)
    assert f"| {OURS} | 4 | 32 | {row['requests_per_s']:,.0f} |" in text
    page.write_text("no markers")
    assert report.main([str(figures), "--write", str(page)]) == 2
    assert report.main([str(figures)]) == 0
    assert "### Targets" in capsys.readouterr().out


def test_targets_that_are_missed_are_told(figures):
    written = json.loads(figures.read_text())
    report.find(written, OURS, 1, 32)["requests_per_s"] = report.find(written, BOUND, 1, 32)["requests_per_s"] * 2
    assert "| ≥ 1.05 × | 2.00 × | yes |" in report.markdown(written)
    report.find(written, OURS, 1, 32)["requests_per_s"] = report.find(written, BOUND, 1, 32)["requests_per_s"] / 2
    assert "| ≥ 1.05 × | 0.50 × | **no** |" in report.markdown(written)


def test_the_plot_is_drawn(figures, tmp_path):
    path = tmp_path / "performance.png"
    assert plot.main([str(figures), str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("script", [serving, overload, soak])
def test_without_a_bundle_the_scripts_say_what_makes_one(script, tmp_path, capsys):
    assert script.main(["--repository", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "make train" in error
    assert "make demo" in error


def test_a_server_that_does_not_start_is_an_error(repository, capsys):
    arguments = ["--repository", str(repository), "--model", MODEL, "--serve-option=--no-such-option", "--idle", "0"]
    assert serving.main(arguments) == 1
    assert "--no-such-option" in capsys.readouterr().err


def test_a_wrong_model_is_found_out(repository, tmp_path, monkeypatch):
    """The figures of a server whose answers are not the model's make the run fail."""
    monkeypatch.setattr(serving.inprocess, "answers", lambda session, inputs: {"logits": np.zeros((1, 10), np.float32)})
    sizes = ["--images", "1", "--in-flight", "4", "--mode", "unary", "--rounds", "1", "--seconds", "0.2", "--idle", "0"]
    path = tmp_path / "serving.json"
    assert serving.main(["--repository", str(repository), "--model", MODEL, *sizes, "--json", str(path)]) == 1
    row = report.find(json.loads(path.read_text()), OURS, 1, 4)
    assert row["requests_per_s"] == 0
    assert row["statuses"].keys() == {"WRONG"}


def test_a_peer_that_cannot_be_installed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(peers.PeerError, match="mlserver"):
        peers.install("mlserver", base=str(tmp_path / "no-python"))


def test_requests_are_different_and_repeatable():
    made = [infer_request(MODEL, INPUTS, random_inputs(INPUTS, 2, seed)) for seed in (0, 1, 0)]
    assert made[0] == made[2] != made[1]
    tensor = pb.ModelInferRequest.FromString(made[0]).inputs[0]
    assert list(tensor.shape) == [2, 1, 28, 28]
    with pytest.raises(ValueError, match="BYTES"):
        random_inputs([TensorSpec(name="text", datatype="BYTES", shape=("batch",))], 1, 0)
