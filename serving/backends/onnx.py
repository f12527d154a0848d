"""ONNX Runtime: the only module that imports it.

A CUDA provider that cannot load does not raise by itself: the session silently runs on the CPU. So a CUDA session is
opened with every fallback forbidden, read back, and made to run a convolution before it is believed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from serving.backends import cuda
from serving.bundle import Bundle
from serving.errors import BundleError, DeviceError, InvalidArgument
from serving.tensors import Array, TensorSpec

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#configuration-options
CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE, the default, tunes again for every new batch size
    "use_tf32": "0",  # TF32 keeps 10 bits of the mantissa: not the trained model's answers
    "arena_extend_strategy": "kSameAsRequested",  # the default doubles the memory at every growth
}

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


# What ONNX Runtime raises when a node cannot take its input: an index out of range, shapes that do not fit.
_REFUSALS = (_state.Fail, _state.InvalidArgument, _state.RuntimeException)


class OnnxBackend:
    """An ONNX Runtime session behind the `Backend` protocol."""

    name = "onnx"

    def __init__(self, session: ort.InferenceSession, file: str) -> None:
        self.file = file
        self._session = session
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]
        self._texts = [spec.name for spec in self.inputs if spec.datatype == "BYTES"]
        self.provider, self.device = _read_back(session)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Backend.run`. `InferenceSession.run` is thread-safe and releases the interpreter's lock."""
        given = dict(inputs)
        for name in self._texts:
            given[name] = _as_text(name, given[name])
        try:
            return dict(zip(self._output_names, self._session.run(self._output_names, given), strict=True))
        except _REFUSALS as error:
            if self.device != "cpu":  # there, the device may be at fault
                raise
            raise InvalidArgument(f"the model cannot run with these inputs: {error}") from error


def _as_text(name: str, elements: Array) -> Array:
    """BYTES elements as ONNX's strings, which are UTF-8; ONNX Runtime would make "b'x'" of b"x"."""
    try:
        texts = [element.decode() for element in elements.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"input '{name}' has an element that is not UTF-8, which ONNX's strings are") from error
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(elements.shape)


def open_model(bundle: Bundle, file: str, device: str, threads: int) -> OnnxBackend:
    """Open one of a bundle's ONNX files on `cpu` or `cuda:N`; see `serving.backends.open_backend`."""
    session = open_session(bundle.read(file), device, threads)
    backend = OnnxBackend(session, file)
    if (backend.inputs, backend.outputs) != (bundle.manifest.inputs, bundle.manifest.outputs):
        raise BundleError(f"{bundle.path}: {file}'s signature is not the manifest's")
    labels = session.get_modelmeta().custom_metadata_map.get("labels")
    if labels is None or tuple(json.loads(labels)) != bundle.manifest.labels:
        raise BundleError(f"{bundle.path}: {file}'s labels are {labels}, not the manifest's")
    return backend


def open_file(path: Path, device: str, threads: int) -> OnnxBackend:
    """Open a plain ONNX file on `cpu` or `cuda:N`; see `serving.backends.open_unverified`."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    return OnnxBackend(open_session(model, device, threads), path.name)


def open_session(model: bytes, device: str, threads: int = 1) -> ort.InferenceSession:
    """A session that runs where it was asked to, or an error.

    Args:
        model: a serialised ONNX model.
        device: `cpu` or `cuda:N`.
        threads: threads for one run; on CUDA the few nodes' launches need only one.

    Raises:
        DeviceError: CUDA was asked for and does not run; the text has the cause.
        BundleError: ONNX Runtime refuses the model.
    """
    if device == "cpu":
        return _create(model, session_options(device, threads), [CPU])
    _prove_cuda(device)
    return _create_on_cuda(model, device, threads)


@functools.cache  # once a device
def _prove_cuda(device: str) -> None:
    """Run a convolution on `cuda:N`: from then on, a model that does not open is itself at fault.

    Raises:
        DeviceError: it does not run there; the text has the cause.
    """
    problem = cuda.device_problem(int(device.partition(":")[2])) or _provider_problem("cuda")
    if problem:
        raise DeviceError(problem)
    try:
        session = _create_on_cuda(PROBE_MODEL, device, threads=1)
        session.run(None, {"x": np.ones((2, 1, 4, 4), np.float32)})  # a missing cuDNN shows only now
    except Exception as error:  # ONNX Runtime's exceptions share no root but this
        raise DeviceError(f"ONNX Runtime does not run on {device}: {error}") from error


def _create_on_cuda(model: bytes, device: str, threads: int) -> ort.InferenceSession:
    options = {"device_id": device.partition(":")[2], **CUDA_OPTIONS}
    session = _create(model, session_options(device, threads), [(CUDA, options)])
    session.disable_fallback()  # or run() would rebuild the session on the CPU after a CUDA failure
    provider, ran_on = _read_back(session)
    if (provider, ran_on) != (CUDA, device):
        raise DeviceError(f"ONNX Runtime was asked for {device} and runs on {ran_on} with {provider}")
    return session


def session_options(device: str, threads: int) -> ort.SessionOptions:
    """The options of a session on `cpu` or `cuda:N`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads answer 50 us sooner and keep a core busy while nothing is asked.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")  # what _read_back reads
    options.log_severity_level = 4  # fatal only: what goes wrong is raised, and said once
    if device != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _create(model: bytes, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no root but this
        raise BundleError(f"ONNX Runtime cannot open the model: {error}") from error


def _read_back(session: ort.InferenceSession) -> tuple[str, str]:
    """The provider and device that the session's nodes were really given to."""
    assigned = sorted({group.ep_name for group in session.get_provider_graph_assignment_info()})
    if assigned == [CUDA]:
        return CUDA, f"cuda:{session.get_provider_options()[CUDA].get('device_id', '0')}"
    return "+".join(assigned) or session.get_providers()[0], "cpu"


def _provider_problem(provider: str) -> str | None:
    """Why a provider's library does not load, None when it does; loads what it needs from the nvidia packages first."""
    capi = Path(ort.__file__).parent / "capi"
    library = capi / f"libonnxruntime_providers_{provider}.so"
    if sys.platform != "linux":
        return None  # the session itself has to tell
    if not library.exists():
        return (
            f"this onnxruntime {ort.__version__} was built without {provider}: "
            "pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        ort.preload_dlls()  # prints what it misses instead of raising
    ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
    problem = cuda.library_problem(str(library))
    if problem and provider == "cuda":
        return f"{problem}; onnxruntime-gpu needs CUDA 13 and cuDNN 9: pip install 'parityserve[cuda]', or torch"
    return problem


def _spec(node: Any) -> TensorSpec:
    if node.type not in _DATATYPES:
        raise BundleError(f"{node.name} is a {node.type}, which cannot be served; want one of {', '.join(_DATATYPES)}")
    # An axis of any length may be without a name.
    shape = tuple(axis if isinstance(axis, int) else axis or f"axis{i}" for i, axis in enumerate(node.shape))
    return TensorSpec(name=node.name, datatype=_DATATYPES[node.type], shape=shape)


# A convolution of one 3x3 kernel of ones over [n,1,4,4], opset 20, IR 10: `tests/test_devices.py` builds it again.
PROBE_MODEL = bytes.fromhex(
    "080a3a89010a0f0a01780a01771201792204436f6e76120570726f62652a330801080108030803100122240000803f000080"
    "3f0000803f0000803f0000803f0000803f0000803f0000803f0000803f4201775a1c0a017812170a15080112110a0312016e"
    "0a0208010a0208040a020804621c0a017912170a15080112110a0312016e0a0208010a0208020a02080242040a001014"
)


def provider_problem(provider: str) -> str | None:
    """Why an execution provider of this ONNX Runtime does not run a convolution here; None when it does."""
    if provider == CPU:
        device, short = "cpu", ""
    elif provider == CUDA:
        device, short = "cuda:0", "cuda"
    else:
        short = provider.removesuffix("ExecutionProvider").lower()
        return _provider_problem(short) or "parityserve does not use this provider"
    try:
        open_session(PROBE_MODEL, device)
    except (DeviceError, BundleError) as error:
        return str(error)
    return None


def available_providers() -> list[str]:
    """The providers that this ONNX Runtime was built with; whether they run is another question."""
    return list(ort.get_available_providers())
