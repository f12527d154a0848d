"""ONNX Runtime: where its sessions are made.

A CUDA provider that cannot load does not raise by itself: the session silently runs on the CPU. So a CUDA session is
opened with every fallback forbidden, read back, and made to run a convolution before it is believed.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from serving.backends import cuda
from serving.backends.engine import DEFAULT, Engine, cuda_options, tensorrt_options
from serving.backends.onnx_buffers import BufferedSession, can_bind
from serving.bundle import Bundle, Precision
from serving.errors import BundleError, DeviceError, InvalidArgument
from serving.tensors import Array, TensorSpec

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

# Rows of one run on the CPU, for each thread. What lies between the layers of more rows does not stay in every core's
# cache: 64 at once took as long as four times 16 on one machine, 10 to 30 % longer on others.
ROWS = (16, 64)
_LOCK_S = 1.5e-4  # what each run waits for the interpreter's lock, where the event loop is busy
_LONG_S = 1e-3  # beside rows that take longer, that is nothing

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

    def __init__(self, session: ort.InferenceSession, file: str, engine: Engine) -> None:
        self.file = file
        self.tf32 = engine.tf32
        self._session = session
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]
        self._texts = [spec.name for spec in self.inputs if spec.datatype == "BYTES"]
        self.provider, self.device = _read_back(session)
        self._rows = self._measured_rows(engine.threads)
        self._buffered: BufferedSession | None = None
        sizes: tuple[int, ...] = ()
        if self.device != "cpu":  # there, a plain run reads and writes the caller's own memory
            sizes = engine.buckets if can_bind((*self.inputs, *self.outputs)) else ()
            signature = (self.inputs, self.outputs)
            self._buffered = BufferedSession(session, self.device, *signature, sizes, engine.cuda_graphs)
        self.settings = _settings(session, self.device, sizes, engine)
        if self._rows:
            self.settings["rows_per_run"] = str(self._rows)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Backend.run`. `InferenceSession.run` is thread-safe and releases the interpreter's lock."""
        given = dict(inputs)
        for name in self._texts:
            given[name] = _as_text(name, given[name])
        if self._buffered:
            return self._buffered.run(given)  # what fails there may be the device's fault
        try:
            parts = [self._session.run(self._output_names, part) for part in self._parts(given)]
        except _REFUSALS as error:
            raise InvalidArgument(f"the model cannot run with these inputs: {error}") from error
        outputs = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return dict(zip(self._output_names, outputs, strict=True))

    def _measured_rows(self, threads: int) -> int:
        """How many rows to run at once; 0 for any number."""
        if self.device != "cpu" or not _has_batch(self.inputs, self.outputs):
            return 0
        shapes = {spec.name: spec.dims()[1:] for spec in self.inputs}
        if self._texts or any(axis < 0 for shape in shapes.values() for axis in shape):
            return ROWS[0] * threads

        def run(rows: int) -> None:
            zeros = {spec.name: np.zeros((rows * threads, *shapes[spec.name]), spec.dtype) for spec in self.inputs}
            self._session.run(self._output_names, zeros)

        try:
            return rows_per_run(run) * threads
        except _REFUSALS:  # it cannot run zeros
            return ROWS[0] * threads

    def _parts(self, inputs: dict[str, Array]) -> list[dict[str, Array]]:
        """The inputs by rows, in as few parts of about the same size as there may be."""
        lengths = {len(array) for array in inputs.values()} if self._rows else set()
        if len(lengths) != 1 or (rows := lengths.pop()) <= self._rows:
            return [inputs]
        count = -(-rows // self._rows)
        split = {name: np.array_split(array, count) for name, array in inputs.items()}
        return [{name: arrays[part] for name, arrays in split.items()} for part in range(count)]


def rows_per_run(run: Callable[[int], None], clock: Callable[[], float] = time.perf_counter) -> int:
    """Which of `ROWS` answers many rows sooner, beside an event loop that is busy.

    Args:
        run: runs the model on so many rows.
        clock: seconds.
    """

    def took(rows: int) -> float:
        start = clock()
        run(rows)
        return clock() - start

    few, many = ROWS
    run(1)
    if took(1) > _LONG_S:
        return few
    parts = many // few
    for _ in range(2):
        run(many)  # gets the memory that later runs have
    apart, whole = math.inf, math.inf
    for _ in range(4):
        apart = min(apart, sum(took(few) for _ in range(parts)))
        whole = min(whole, took(many))
    return many if whole <= apart + (parts - 1) * _LOCK_S else few


def _has_batch(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Whether the first axis of all tensors is named `batch`: then no row depends on another."""
    return all(spec.shape[:1] == ("batch",) for spec in (*inputs, *outputs))


def _as_text(name: str, elements: Array) -> Array:
    """BYTES elements as ONNX's strings, which are UTF-8; ONNX Runtime would make "b'x'" of b"x"."""
    try:
        texts = [element.decode() for element in elements.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"input '{name}' has an element that is not UTF-8, which ONNX's strings are") from error
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array.reshape(elements.shape)


def open_model(bundle: Bundle, file: str, device: str, engine: Engine) -> OnnxBackend:
    """Open one of a bundle's ONNX files on `cpu` or `cuda:N`; see `serving.backends.open_backend`."""
    _, precision = bundle.manifest.artefacts()[file]
    session = open_session(bundle.read(file), device, engine, precision)
    backend = OnnxBackend(session, file, engine)
    if (backend.inputs, backend.outputs) != (bundle.manifest.inputs, bundle.manifest.outputs):
        raise BundleError(f"{bundle.path}: {file}'s signature is not the manifest's; export the model again")
    labels = session.get_modelmeta().custom_metadata_map.get("labels")
    if labels is None or tuple(json.loads(labels)) != bundle.manifest.labels:
        raise BundleError(f"{bundle.path}: {file}'s labels are {labels}, not the manifest's; export the model again")
    return backend


def open_file(path: Path, device: str, engine: Engine) -> OnnxBackend:
    """Open a plain ONNX file on `cpu` or `cuda:N`; see `serving.backends.open_unverified`."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    return OnnxBackend(open_session(model, device, engine), path.name, engine)


def open_session(
    model: bytes, device: str, engine: Engine = DEFAULT, precision: Precision = "fp32"
) -> ort.InferenceSession:
    """A session that runs where it was asked to, or an error.

    Args:
        model: a serialised ONNX model.
        device: `cpu` or `cuda:N`.
        engine: how to run it.
        precision: the file's, which TensorRT has to be told.

    Raises:
        DeviceError: CUDA or TensorRT was asked for and does not run; the text has the cause.
        BundleError: ONNX Runtime refuses the model.
    """
    if device == "cpu":
        return _create(model, session_options(device, engine.threads), [CPU])
    _prove_cuda(device)
    if engine.provider == "tensorrt" and (problem := _provider_problem("tensorrt")):
        raise DeviceError(problem)
    return _create_on_cuda(model, device, engine, precision)


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
        session = _create_on_cuda(PROBE_MODEL, device, DEFAULT, "fp32")
        session.run(None, {"x": np.ones((2, 1, 4, 4), np.float32)})  # a missing cuDNN shows only now
    except Exception as error:  # ONNX Runtime's exceptions share no root but this
        raise DeviceError(f"ONNX Runtime does not run on {device}: {error}") from error


def _create_on_cuda(model: bytes, device: str, engine: Engine, precision: Precision) -> ort.InferenceSession:
    providers = [(CUDA, cuda_options(engine, device))]
    if engine.provider == "tensorrt":
        options = tensorrt_options(engine, device, precision, hashlib.sha256(model).hexdigest())
        if folder := options.get("trt_engine_cache_path"):
            Path(folder).mkdir(parents=True, exist_ok=True)
        providers.insert(0, (TENSORRT, options))
    # One thread of the CPU: all that it does is to launch a few kernels.
    session = _create(model, session_options(device, threads=1), providers)
    session.disable_fallback()  # or run() would rebuild the session on the CPU after a CUDA failure
    require(session, device, providers[0][0])
    return session


def require(session: ort.InferenceSession, device: str, provider: str) -> None:
    """Read back that a session's nodes are on a device, with a provider among those that have them.

    Raises:
        DeviceError: they are not.
    """
    found, ran_on = _read_back(session)
    if ran_on != device or provider not in found.split("+"):
        raise DeviceError(f"ONNX Runtime was asked for {device} with {provider}, and runs on {ran_on} with {found}")


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
    """The providers, joined by +, and the device that the session's nodes were really given to."""
    assigned = sorted({group.ep_name for group in session.get_provider_graph_assignment_info()}, reverse=True)
    if assigned and set(assigned) <= {CUDA, TENSORRT}:  # TensorRT leaves to CUDA what it cannot run
        return "+".join(assigned), f"cuda:{session.get_provider_options()[CUDA].get('device_id', '0')}"
    return "+".join(assigned) or session.get_providers()[0], "cpu"


def _settings(session: ort.InferenceSession, device: str, sizes: tuple[int, ...], engine: Engine) -> dict[str, str]:
    """What is in force, as `Backend.settings` has it; what ONNX Runtime knows is read back from it."""
    options = session.get_session_options()
    found = {
        "threads": str(options.intra_op_num_threads),
        "graph_optimization": options.graph_optimization_level.name.removeprefix("ORT_").lower(),
    }
    if device != "cpu":
        batches = ",".join(map(str, sizes)) or "none"
        found |= {"io_binding": batches, "cuda_graphs": batches if engine.cuda_graphs else "none"}
    for provider, values in session.get_provider_options().items():
        found |= {f"{provider}.{key}": value for key, value in values.items()}
    return found


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
    if provider == "tensorrt":
        with contextlib.suppress(ImportError):
            importlib.import_module("tensorrt_libs")  # NVIDIA's package, which loads its libraries
    ctypes.CDLL(str(capi / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
    problem = cuda.library_problem(str(library))
    if problem and provider == "cuda":
        return f"{problem}; onnxruntime-gpu needs CUDA 13 and cuDNN 9: pip install 'parityserve[cuda]', or torch"
    if problem and provider == "tensorrt":
        return f"{problem}; --provider tensorrt needs TensorRT 10 and CUDA 13: pip install 'tensorrt-cu13<11'"
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
    known = {CPU: ("cpu", DEFAULT), CUDA: ("cuda:0", DEFAULT), TENSORRT: ("cuda:0", Engine(provider="tensorrt"))}
    if provider not in known:
        short = provider.removesuffix("ExecutionProvider").lower()
        return _provider_problem(short) or "parityserve does not use this provider"
    device, engine = known[provider]
    try:
        open_session(PROBE_MODEL, device, engine)
    except (DeviceError, BundleError) as error:
        return str(error)
    return None


def available_providers() -> list[str]:
    """The providers that this ONNX Runtime was built with; whether they run is another question."""
    return list(ort.get_available_providers())
