"""What runs a model: one protocol, one opener. ONNX Runtime and TorchScript each live in a module of their own."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from typing import Protocol

from serving.bundle import Bundle
from serving.errors import DeviceError
from serving.tensors import Array, TensorSpec

logger = logging.getLogger(__name__)

MODULES = {"onnx": "serving.backends.onnx", "torchscript": "serving.backends.torchscript"}


class Backend(Protocol):
    """A model opened on a device. `provider` and `device` are read back from what really runs, never from a setting."""

    name: str  # onnx, torchscript
    provider: str  # CPUExecutionProvider, CUDAExecutionProvider, torch
    device: str  # cpu, cuda:0
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once. Inputs and outputs are keyed by name and share their first axis, the batch.

        The caller has checked names, datatypes and shapes. Safe to call from several threads.
        """


def open_backend(name: str, bundle: Bundle, device: str = "auto", threads: int = 1) -> Backend:
    """Open a bundle's file for a backend on a device.

    Args:
        name: `onnx` or `torchscript`.
        bundle: the version; its file's bytes are verified before they are used.
        device: `cpu`; `cuda` or `cuda:N`, which fails where CUDA does not run; `auto`, CUDA where it runs, else the
            CPU, with one warning that says why.
        threads: threads for one run on the CPU.

    Raises:
        DeviceError: the device cannot be used, or the backend is not installed.
        BundleError: the file is missing, damaged, or not what the manifest says.
    """
    try:
        opener = importlib.import_module(MODULES[name]).open_model
    except ModuleNotFoundError as error:
        raise DeviceError(
            f"backend {name} needs {error.name}, which is not installed: pip install 'parityserve[train]'"
        ) from error
    if device == "auto":
        try:
            return opener(bundle, "cuda:0", threads)  # type: ignore[no-any-return]
        except DeviceError as error:
            _warn_of_fallback(str(error))
            device = "cpu"
    return opener(bundle, "cuda:0" if device == "cuda" else device, threads)  # type: ignore[no-any-return]


@functools.cache  # once a cause, however many models are opened
def _warn_of_fallback(cause: str) -> None:
    logger.warning("device auto: the CPU is used, because %s", cause)
