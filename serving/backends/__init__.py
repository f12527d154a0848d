"""What runs a model: one protocol, one opener. Each backend lives in a module of its own."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

from serving.backends.engine import DEFAULT, Engine
from serving.bundle import Bundle, Precision
from serving.errors import DeviceError
from serving.tensors import Array, TensorSpec

logger = logging.getLogger(__name__)

MODULES = {name: f"serving.backends.{name}" for name in ("onnx", "torchscript", "pt2", "aoti")}


class Backend(Protocol):
    """A model opened on a device. `provider` and `device` are read back from what really runs, never from a setting."""

    name: str  # onnx, torchscript, pt2, aoti
    file: str  # of the bundle, such as model.onnx
    provider: str  # CPUExecutionProvider, CUDAExecutionProvider, torch
    device: str  # cpu, cuda:0
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tf32: bool  # whether a GPU may multiply in TF32
    settings: Mapping[str, str]  # what else is in force, read back where that can be

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once. Inputs and outputs are keyed by name and share their first axis, the batch.

        The caller has checked names, datatypes and shapes. Safe to call from several threads.
        """


def open_backend(
    name: str, bundle: Bundle, device: str = "auto", engine: Engine = DEFAULT, precision: str = "fp32"
) -> Backend:
    """Open a bundle's file for a backend on a device.

    Args:
        name: one of `MODULES`.
        bundle: the version; its file's bytes are verified before they are used.
        device: `cpu`; `cuda` or `cuda:N`, which fails where CUDA does not run; `auto`, CUDA where it runs, else the
            CPU, with one warning that says why.
        engine: how to run it.
        precision: which of the backend's files: `fp32`, `fp16`, `int8`; or `auto`, see `choose_precision`.

    Raises:
        DeviceError: the device cannot be used, or the backend is not installed.
        BundleError: the file is missing, damaged, or not what the manifest says.
    """
    module = _module(name)

    def open_on(device: str) -> Backend:
        chosen = choose_precision(bundle, name, device) if precision == "auto" else precision
        backend: Backend = module.open_model(bundle, bundle.manifest.file_for(name, chosen), device, engine)
        return backend

    return _on_device(device, open_on)


def choose_precision(bundle: Bundle, backend: str, device: str) -> Precision:
    """The smallest precision that a version was proved in and that pays on a device: int8 on the CPU, fp16 on CUDA."""
    smallest: Precision = "int8" if device == "cpu" else "fp16"
    return smallest if (backend, smallest) in bundle.manifest.artefacts().values() else "fp32"


def open_unverified(path: Path, device: str = "auto", engine: Engine = DEFAULT) -> Backend:
    """Open a plain ONNX file, of which nothing is known but what it says itself; otherwise as `open_backend`.

    Raises:
        DeviceError: the device cannot be used.
        BundleError: the file cannot be read, or ONNX Runtime refuses it.
    """
    module = _module("onnx")
    return _on_device(device, lambda device: module.open_file(path, device, engine))


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"backend {name} needs {error.name}, which is not installed: pip install 'parityserve[train]'"
        ) from error


def _on_device(device: str, opener: Callable[[str], Backend]) -> Backend:
    """Open on a device as `open_backend` takes it: the only place that falls back."""
    if device == "auto":
        try:
            return opener("cuda:0")
        except DeviceError as error:
            _warn_of_fallback(str(error))
            device = "cpu"
    return opener("cuda:0" if device == "cuda" else device)


@functools.cache  # once a cause, however many models are opened
def _warn_of_fallback(cause: str) -> None:
    logger.warning("device auto: the CPU is used, because %s", cause)
