"""How a file is run: the options that ONNX Runtime is given, buffers and graphs, and what is said to be in force."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tritonclient.grpc as triton
from conftest import MODEL, running
from onnx import TensorProto, helper
from pydantic import ValidationError

from serving.__main__ import main
from serving.backends import cuda, open_backend
from serving.backends import onnx as onnx_backend
from serving.backends.engine import Engine, bucket_sizes, cuda_options, tensorrt_options
from serving.backends.onnx_buffers import BufferedSession, can_bind
from serving.bundle import open_bundle
from serving.client import Client
from serving.config import ServerConfig
from serving.errors import DeviceError
from serving.loading import golden_check
from serving.parity import compare_outputs, tolerance
from serving.tensors import TensorSpec
from trainer import parity
from trainer.train import predict

# --- settings


def test_what_cuda_is_told():
    assert cuda_options(Engine(), "cuda:1") == {
        "device_id": "1",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
    }
    chosen = Engine(tf32=True, cuda_memory_mb=512, cuda_conv_search="exhaustive", cuda_graphs=True)
    assert cuda_options(chosen, "cuda:0") == {
        "device_id": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "use_tf32": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "gpu_mem_limit": "536870912",
        "enable_cuda_graph": "1",
    }


def test_what_tensorrt_is_told(tmp_path):
    plain = {"device_id": "1", "trt_fp16_enable": "0", "trt_int8_enable": "0"}
    assert tensorrt_options(Engine(provider="tensorrt"), "cuda:1", "fp32", "ab") == plain
    assert tensorrt_options(Engine(tensorrt_cache=tmp_path), "cuda:1", "fp16", "ab") == {
        **plain,
        "trt_fp16_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"{tmp_path}/ab",
    }
    assert tensorrt_options(Engine(), "cuda:1", "int8", "ab") == {**plain, "trt_int8_enable": "1"}


def test_the_servers_settings_reach_the_engine(tmp_path):
    assert ServerConfig().engine == Engine(buckets=(1, 2, 4, 8, 16, 32, 64))
    cuda_only = {"tf32": True, "cuda_memory_mb": 64, "cuda_conv_search": "default", "cuda_graphs": True}
    assert ServerConfig(**cuda_only, max_batch_size=3).engine == Engine(**cuda_only, buckets=(1, 2, 3))
    tensorrt = {"provider": "tensorrt", "tensorrt_cache": tmp_path, "tf32": True, "threads": 2}
    assert ServerConfig(**tensorrt, max_batch_size=1).engine == Engine(**tensorrt, buckets=(1,))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"device": "cpu", "tf32": True}, r"--tf32 is for a GPU, and has no effect with --device cpu"),
        ({"device": "cpu", "cuda_graphs": True}, r"--cuda-graphs is for a GPU"),
        ({"device": "cpu", "cuda_memory_mb": 64}, r"--cuda-memory-mb is for a GPU"),
        ({"device": "cpu", "cuda_conv_search": "default"}, r"--cuda-conv-search is for a GPU"),
        ({"device": "cpu", "provider": "tensorrt", "tf32": False}, r"--provider is for a GPU"),
        ({"backend": "aoti", "tf32": True}, r"--tf32 is for a GPU.* --backend aoti, which is compiled for the CPU"),
        ({"backend": "pt2", "cuda_graphs": True}, r"--cuda-graphs is for --backend onnx, and has no effect with pt2"),
        ({"provider": "tensorrt", "tf32": True, "cuda_graphs": True}, r"--cuda-graphs is for --provider cuda"),
        ({"provider": "tensorrt", "tf32": True, "cuda_memory_mb": 64}, r"--cuda-memory-mb is for --provider cuda"),
        ({"provider": "tensorrt"}, r"--provider tensorrt multiplies fp32 in TF32.*give --tf32 too"),
        ({"tensorrt_cache": "somewhere"}, r"--tensorrt-cache needs --provider tensorrt"),
        ({"cuda_graphs": True, "instances": 4}, r"--cuda-graphs: .*want --instances 1, got 4"),
        ({"cuda_memory_mb": 1}, r"greater than or equal to 16"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, problem):
    with pytest.raises(ValidationError, match=problem):
        ServerConfig(**settings)


def test_what_torch_and_tensorrt_can_do_is_accepted():
    assert ServerConfig(backend="torchscript", tf32=True).engine.tf32
    assert not ServerConfig(provider="tensorrt", precision="fp16").engine.tf32


# --- buffers, of which nothing is CUDA's alone: those of these sessions are on the CPU


class Watched:
    """A session that notes the thread and the graph of each run."""

    def __init__(self, session):
        self._session = session
        self.io_binding = session.io_binding
        self.runs = []

    def run(self, names, inputs, options):
        self._note("plain", options)
        return self._session.run(names, inputs, options)

    def run_with_iobinding(self, binding, options):
        self._note("bound", options)
        self._session.run_with_iobinding(binding, options)

    def _note(self, kind, options):
        graph = options.get_run_config_entry("gpu_graph_id") if options else None
        self.runs.append((kind, graph, threading.get_ident()))


@pytest.fixture
def session(bundle):
    return Watched(onnx_backend.open_session(bundle.read("model.onnx"), "cpu"))


@pytest.fixture
def images(sample):
    """The test images, uint8 [150, 1, 28, 28], as they come off the wire: read-only."""
    array = sample[1].images.numpy().copy()
    array.setflags(write=False)
    return array


@pytest.mark.parametrize("graphs", [False, True])
def test_buffers_answer_like_a_plain_run(bundle, session, images, graphs):
    plain = open_backend("onnx", bundle, "cpu")
    buffered = BufferedSession(session, "cpu", plain.inputs, plain.outputs, (1, 2, 4), graphs)
    batches = [images[start : start + size] for size in (1, 2, 3, 4, 7) for start in (0, 50)]
    answers = [buffered.run({"image": batch}) for batch in batches]  # judged after the last: they must not share memory
    for batch, answer in zip(batches, answers, strict=True):
        for name, want in plain.run({"image": batch}).items():
            np.testing.assert_array_equal(answer[name], want)
    kinds, ids, threads = zip(*session.runs, strict=True)
    assert kinds == ("bound",) * 4 + ("plain",) * 2 + ("bound",) * 2 + ("plain",) * 2
    assert ids == (("1", "1", "2", "2", "-1", "-1", "4", "4", "-1", "-1") if graphs else (None,) * 10)
    assert len(set(threads)) == 1
    assert (threading.get_ident() in threads) != graphs


@pytest.mark.parametrize("graphs", [False, True])
def test_threads_do_not_get_each_others_answers(bundle, session, images, graphs):
    plain = open_backend("onnx", bundle, "cpu")
    buffered = BufferedSession(session, "cpu", plain.inputs, plain.outputs, (8,), graphs)
    together = threading.Barrier(4)

    def ask(start):
        batch = images[start : start + 8]
        want = plain.run({"image": batch})["logits"]
        together.wait(30)
        return all(np.array_equal(buffered.run({"image": batch})["logits"], want) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, (0, 10, 20, 30)))
    assert len({thread for _, _, thread in session.runs}) == (1 if graphs else 4)


def test_which_signatures_have_buffers():
    def spec(*shape, datatype="FP32"):
        return TensorSpec(name="x", datatype=datatype, shape=shape)

    assert can_bind([spec("batch", 1, 28, 28, datatype="UINT8"), spec("batch", 10)])
    assert not can_bind([spec("batch", 1), spec("batch", "classes")])
    assert not can_bind([spec("batch", 1), spec("found", 1)])
    assert not can_bind([spec("batch", 1, datatype="BYTES"), spec("batch", 1)])
    assert not can_bind([spec(1, 10), spec(1, 10)])
    assert not can_bind([spec(), spec("batch")])


# --- strictness


def test_a_session_that_is_elsewhere_is_refused():
    session = onnx_backend.open_session(onnx_backend.PROBE_MODEL, "cpu")
    onnx_backend.require(session, "cpu", onnx_backend.CPU)
    with pytest.raises(DeviceError, match=r"asked for cuda:0 with CUDAEx.*runs on cpu with CPUExecutionProvider"):
        onnx_backend.require(session, "cuda:0", onnx_backend.CUDA)
    with pytest.raises(DeviceError, match=r"asked for cpu with TensorrtExecutionProvider"):
        onnx_backend.require(session, "cpu", onnx_backend.TENSORRT)


@pytest.mark.skipif(
    onnx_backend._provider_problem("tensorrt") is None, reason="TensorRT is installed: nothing can fail"
)
def test_tensorrt_without_its_library_fails_with_the_remedy(bundle, monkeypatch):
    monkeypatch.setattr(onnx_backend, "_prove_cuda", lambda device: None)  # as if there were a GPU
    with pytest.raises(DeviceError, match=r"lib\w+\.so.*needs TensorRT 10 and CUDA 13: pip install 'tensorrt-cu13<11'"):
        open_backend("onnx", bundle, "cuda", Engine(provider="tensorrt"))
    assert "tensorrt-cu13<11" in onnx_backend.provider_problem(onnx_backend.TENSORRT)


class OnGpu:
    """A backend that says that it is on a GPU, and whose logits are off."""

    device = "cuda:0"

    def __init__(self, backend, tf32, off):
        self._backend = backend
        self.tf32 = tf32
        self._off = off

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def run(self, inputs):
        outputs = self._backend.run(inputs)
        return {**outputs, "logits": outputs["logits"] + self._off}


def test_the_golden_check_allows_for_tf32_where_it_was_asked_for(bundle):
    backend = open_backend("onnx", bundle, "cpu")
    assert golden_check(bundle, OnGpu(backend, tf32=True, off=1e-2)).passed
    assert not golden_check(bundle, OnGpu(backend, tf32=False, off=1e-2)).passed
    assert not golden_check(bundle, OnGpu(backend, tf32=True, off=1.0)).passed


# --- what is in force


def test_what_is_in_force_is_read_back(bundle):
    settings = dict(open_backend("onnx", bundle, "cpu", Engine(threads=2)).settings)
    assert settings.pop("rows_per_run") in ("32", "128")
    assert settings == {"threads": "2", "graph_optimization": "enable_all"}
    assert open_backend("torchscript", bundle, "cpu", Engine(threads=2)).settings == {"threads": "2"}


class Session:
    """An ONNX Runtime session that notes the rows of its runs."""

    def __init__(self, session):
        self._session = session
        self.rows = []

    def run(self, names, inputs):
        self.rows.append(len(inputs["image"]))
        return self._session.run(names, inputs)


@pytest.mark.parametrize(
    ("row_us", "beyond_cache_us", "rows"),
    [
        (50, 0, 64),
        (50, 7, 64),  # 448 us in all, less than three times the lock
        (50, 8, 16),
        (1000, 0, 64),
        (1001, 0, 16),  # not tried: a big model would take long to start, and the lock is nothing to it
    ],
)
def test_how_many_rows_run_at_once_is_measured(row_us, beyond_cache_us, rows):
    now_us, runs = 0, []

    def run(count):
        nonlocal now_us
        now_us += count * (row_us + beyond_cache_us * (count > 16))
        runs.append(count)

    assert onnx_backend.rows_per_run(run, lambda: now_us / 1e6) == rows
    assert max(runs) == (64 if row_us <= 1000 else 1)


@pytest.mark.parametrize(
    ("threads", "count", "rows"),
    [(1, 16, [16]), (1, 17, [9, 8]), (1, 64, [16] * 4), (1, 100, [15, 15, 14, 14, 14, 14, 14]), (2, 64, [32] * 2)],
)
def test_a_large_batch_runs_in_parts_that_a_cache_can_hold(bundle, sample, monkeypatch, threads, count, rows):
    monkeypatch.setattr(onnx_backend, "rows_per_run", lambda run: onnx_backend.ROWS[0])
    images = sample[1].images.numpy()[:count]
    backend = open_backend("onnx", bundle, "cpu", Engine(threads=threads))
    session = backend._session = Session(backend._session)
    answers = backend.run({"image": images})
    assert session.rows == rows
    whole = dict(zip(("logits", "probabilities"), session._session.run(None, {"image": images}), strict=True))
    assert answers.keys() == whole.keys()
    for name, values in whole.items():
        np.testing.assert_allclose(answers[name], values, rtol=1e-5, atol=1e-5)


def test_only_rows_of_a_batch_are_run_apart(tmp_path):
    """A first axis of another name may mean anything: each row of these sums depends on those before it."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["length", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["length", 2])
    graph = helper.make_graph([helper.make_node("CumSum", ["x", "axis"], ["y"])], "sums", [x], [y])
    graph.initializer.append(helper.make_tensor("axis", TensorProto.INT64, [], [0]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    backend = onnx_backend.open_file(tmp_path / "model.onnx", "cpu", Engine())
    answers = backend.run({"x": np.ones((40, 2), np.float32)})
    assert answers["y"][-1].tolist() == [40, 40]
    assert "rows_per_run" not in backend.settings


def test_the_server_says_what_is_in_force(repository, capsys):
    with running(repository, threads=2) as server:
        with Client(server.address) as client:
            (model,) = client.list_models()
        config = triton.InferenceServerClient(server.address).get_model_config(MODEL).config
        assert main(["models", "--verbose", "--server", server.address]) == 0
    assert (model.file, model.precision, model.settings["threads"]) == ("model.onnx", "fp32", "2")
    assert config.parameters["threads"].string_value == "2"
    assert config.parameters["precision"].string_value == "fp32"
    printed = capsys.readouterr().out
    assert f"{MODEL} version 1:\n" in printed
    assert "  threads = 2\n" in printed


# --- on a GPU


def judged(bundle, backend, precision, images):
    """A backend's answers, and why they are not the reference's: an empty text where they are."""
    want = predict(parity.reference(bundle), torch.from_numpy(images.copy())).numpy()
    allowed = tolerance(precision, backend.device, bundle.manifest.dataset, backend.tf32)
    answers = backend.run({"image": images})
    return answers, "; ".join(compare_outputs(want, answers, allowed).failures)


@pytest.mark.gpu
@pytest.mark.parametrize("file", ["model.onnx", "model.fp16.onnx", "model.pt", "model.pt2"])
def test_every_file_answers_alike_on_cuda(full_repository, images, file):
    full = open_bundle(full_repository / MODEL / "1")
    name, precision = full.manifest.artefacts()[file]
    for tf32 in (True, False):
        backend = open_backend(name, full, "cuda", Engine(tf32=tf32), precision)
        assert (backend.file, backend.device) == (file, "cuda:0")
        for size in (1, 3, len(images)):
            assert not judged(full, backend, precision, images[:size])[1]


@pytest.mark.gpu
def test_every_option_of_cuda_is_in_force(bundle):
    chosen = Engine(tf32=True, cuda_memory_mb=512, cuda_conv_search="exhaustive", cuda_graphs=True, buckets=(1, 2))
    for engine in (Engine(), chosen):
        settings = open_backend("onnx", bundle, "cuda", engine).settings
        found = {name: settings[f"CUDAExecutionProvider.{name}"] for name in cuda_options(engine, "cuda:0")}
        assert found == cuda_options(engine, "cuda:0")
    assert (settings["io_binding"], settings["cuda_graphs"]) == ("1,2", "1,2")


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_buffers_and_graphs_answer_like_a_plain_run_on_cuda(bundle, images, graphs):
    plain = open_backend("onnx", bundle, "cuda")
    backend = open_backend("onnx", bundle, "cuda", Engine(cuda_graphs=graphs, buckets=bucket_sizes(64)))
    for size in (*bucket_sizes(64), 3, 65):
        for start in (0, 40, 80):  # a graph that is replayed must read what is new
            batch = images[start : start + size]
            answers, problem = judged(bundle, backend, "fp32", batch)
            assert not problem
            for name, want in plain.run({"image": batch}).items():
                np.testing.assert_allclose(answers[name], want, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_a_server_on_cuda_names_provider_and_settings(repository, images, reference):
    with (
        running(repository, device="cuda", cuda_graphs=True, cuda_memory_mb=512) as server,
        Client(server.address) as client,
    ):
        result = client.predict(images[:5])  # padded to 8, which is a graph
        (model,) = client.list_models()
    assert (result.provider, result.device) == ("CUDAExecutionProvider", "cuda:0")
    assert [p.class_id for p in result.predictions] == reference[:5].argmax(1).tolist()
    assert model.settings["cuda_graphs"] == "1,2,4,8,16,32,64"
    assert model.settings["CUDAExecutionProvider.gpu_mem_limit"] == str(512 << 20)


@pytest.mark.gpu
def test_tensorrt_answers_alike_and_keeps_what_it_built(bundle, images, tmp_path):
    if problem := cuda.device_problem(0) or onnx_backend._provider_problem("tensorrt"):
        pytest.skip(problem)
    engine = Engine(provider="tensorrt", tf32=True, tensorrt_cache=tmp_path, buckets=(1, 2))
    backend = open_backend("onnx", bundle, "cuda", engine)
    assert "TensorrtExecutionProvider" in backend.provider
    assert backend.device == "cuda:0"
    for size in (1, 2, 3):
        assert not judged(bundle, backend, "fp32", images[:size])[1]
    assert list((tmp_path / bundle.manifest.files["model.onnx"].sha256).iterdir())
