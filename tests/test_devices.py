"""Device truth: what is asked for runs, or start-up fails with the cause; what is reported is read back."""

import onnx
import onnxruntime
import pytest
from conftest import running
from onnx import TensorProto, helper

from serving.backends import cuda, open_backend
from serving.backends import onnx as onnx_backend
from serving.errors import DeviceError

needs_no_gpu = pytest.mark.skipif(cuda.device_problem(0) is None, reason="there is a CUDA device: nothing can fail")


def test_the_cpu_is_read_back(bundle):
    backend = open_backend("onnx", bundle, "cpu")
    assert (backend.name, backend.provider, backend.device) == ("onnx", "CPUExecutionProvider", "cpu")
    backend = open_backend("torchscript", bundle, "cpu")
    assert (backend.name, backend.provider, backend.device) == ("torchscript", "torch", "cpu")


@needs_no_gpu
@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_fails_with_cause_and_remedy(bundle, backend, device):
    with pytest.raises(DeviceError, match=r"no NVIDIA driver .*libcuda\.so\.1.*use --device cpu"):
        open_backend(backend, bundle, device)


@needs_no_gpu
def test_a_server_for_cuda_does_not_start(repository):
    with pytest.raises(DeviceError, match="no NVIDIA driver"), running(repository, device="cuda"):
        pass


@needs_no_gpu
def test_auto_falls_back_with_one_warning_that_says_why(bundle, caplog):
    import serving.backends

    serving.backends._warn_of_fallback.cache_clear()
    for _ in range(3):
        assert open_backend("onnx", bundle, "auto").device == "cpu"
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [f"device auto: the CPU is used, because {cuda.device_problem(0)}"]


def test_a_session_for_cuda_may_not_fall_back():
    """The options with which ONNX Runtime refuses to put a node on the CPU in silence."""
    options = onnx_backend.session_options("cuda:0", threads=1)
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    cpu = onnx_backend.session_options("cpu", threads=2)
    with pytest.raises(RuntimeError, match="disable_cpu_ep_fallback"):
        cpu.get_session_config_entry("session.disable_cpu_ep_fallback")
    assert (cpu.intra_op_num_threads, cpu.inter_op_num_threads) == (2, 1)


@needs_no_gpu
def test_without_the_driver_check_a_cuda_session_still_fails(monkeypatch):
    """Negative control of the layers below the first: each must refuse by itself what plain ONNX Runtime lets pass."""
    plain = onnxruntime.InferenceSession(
        onnx_backend.PROBE_MODEL, _silent(), providers=[(onnx_backend.CUDA, {})], enable_fallback=0
    )
    assert plain.get_providers() == ["CPUExecutionProvider"]  # the trap

    monkeypatch.setattr(cuda, "device_problem", lambda index: None)
    with pytest.raises(DeviceError, match=r"lib\w+\.so"):
        onnx_backend.open_session(onnx_backend.PROBE_MODEL, "cuda:0")
    monkeypatch.setattr(onnx_backend, "_provider_problem", lambda provider: None)
    with pytest.raises(DeviceError, match="ONNX Runtime does not run on cuda:0"):
        onnx_backend.open_session(onnx_backend.PROBE_MODEL, "cuda:0")


def _silent() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def test_a_missing_library_is_named():
    assert "libnothing.so.9: cannot open shared object file" in cuda.library_problem("libnothing.so.9")


def test_the_probe_model_is_what_it_says():
    kernel = helper.make_tensor("w", TensorProto.FLOAT, [1, 1, 3, 3], [1.0] * 9)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1, 2, 2])],
        [kernel],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    assert onnx.load_from_string(onnx_backend.PROBE_MODEL) == model
    assert onnx_backend.provider_problem(onnx_backend.CPU) is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
def test_cuda_runs_and_is_read_back(bundle, sample, backend):
    opened = open_backend(backend, bundle, "cuda")
    assert opened.device == "cuda:0"
    assert opened.provider in ("CUDAExecutionProvider", "torch")
    for size in (1, 3, 64):
        answers = opened.run({"image": sample[1].images[:size].numpy()})
        assert answers["logits"].shape == (size, 10)


@pytest.mark.gpu
def test_a_device_that_does_not_exist_is_refused(bundle):
    with pytest.raises(DeviceError, match="device cuda:99 does not exist"):
        open_backend("onnx", bundle, "cuda:99")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
def test_a_server_on_cuda_passes_the_golden_check(repository, backend):
    with running(repository, device="cuda", backend=backend) as server:
        (status,) = server.server.repository.statuses()
        assert status.served.backend.device == "cuda:0"
