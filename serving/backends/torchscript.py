"""TorchScript: the only module of the server that imports torch, and the only one of the project that calls torch.jit.

torch.jit is deprecated in favour of torch.export and says so at every call; those warnings are silenced here alone.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving.backends import cuda
from serving.bundle import Bundle
from serving.errors import BundleError, DeviceError
from serving.tensors import Array, TensorSpec


class TorchScriptBackend:
    """A TorchScript module behind the `Backend` protocol."""

    name = "torchscript"
    provider = "torch"

    def __init__(
        self,
        module: Any,
        device: torch.device,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        self._module = module
        self._device = device
        self.inputs = inputs
        self.outputs = outputs
        example = {
            spec.name: np.zeros([a if isinstance(a, int) else 2 for a in spec.shape], spec.dtype) for spec in inputs
        }
        try:
            answers = self._forward(example)
        except RuntimeError as error:
            raise BundleError(f"the TorchScript file does not run: {error}") from error
        self.device = str(answers[0].device)  # read back
        if self.device != str(device):
            raise DeviceError(f"the TorchScript file was opened on {device} and answers on {self.device}")
        for spec, answer in zip(outputs, answers, strict=False):
            if answer.cpu().numpy().dtype != spec.dtype or not spec.accepts(tuple(answer.shape)):
                raise BundleError(f"the TorchScript file's {spec.name} is {answer.dtype} {list(answer.shape)}")
        if len(answers) != len(outputs):
            raise BundleError(f"the TorchScript file has {len(answers)} outputs, the manifest {len(outputs)}")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Backend.run`."""
        tensors = self._forward(inputs)
        return {spec.name: tensor.cpu().numpy() for spec, tensor in zip(self.outputs, tensors, strict=True)}

    def _forward(self, inputs: Mapping[str, Array]) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            # A copy: an array that came off the wire is read-only, and torch has no read-only tensors.
            arguments = [torch.tensor(inputs[spec.name], device=self._device) for spec in self.inputs]
            return tuple(self._module(*arguments))


def open_model(bundle: Bundle, device: str, threads: int) -> TorchScriptBackend:
    """Open a bundle's TorchScript file on `cpu` or `cuda:N`; see `serving.backends.open_backend`."""
    probe(device)
    data = bundle.read(bundle.manifest.file_for("torchscript"))
    try:
        with _deprecated():
            module = torch.jit.load(io.BytesIO(data), map_location=device)
    except RuntimeError as error:
        raise BundleError(f"torch cannot open the TorchScript file: {error}") from error
    torch.set_num_threads(threads)  # of the whole process: torch knows no other
    return TorchScriptBackend(module, torch.device(device), bundle.manifest.inputs, bundle.manifest.outputs)


def probe(device: str) -> None:
    """Run a convolution on `cpu` or `cuda:N`.

    Raises:
        DeviceError: it does not run; the text has the cause.
    """
    if device == "cpu":
        return
    problem = cuda.device_problem(int(device.partition(":")[2]))
    if problem is None and not torch.cuda.is_available():
        problem = f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) finds no CUDA device"
    if problem:
        raise DeviceError(problem)
    # fp32 means fp32: TF32 would not give the trained model's answers.
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # missing in the stubs
    try:
        ones = torch.ones(1, 1, 4, 4, device=device)
        torch.nn.functional.conv2d(ones, ones).cpu()
    except RuntimeError as error:
        raise DeviceError(f"torch does not run on {device}: {error}") from error


def save_traced(module: torch.nn.Module, example: torch.Tensor, path: Path) -> None:
    """Trace `module`, freeze it and write it to `path`.

    Args:
        module: in eval mode, on the CPU, without data-dependent control flow.
        example: an input of at least two images, so that no axis is mistaken for a constant 1.
        path: the file to write.
    """
    with _deprecated(), torch.inference_mode():
        traced = torch.jit.trace(module, example)
        torch.jit.save(torch.jit.freeze(traced), str(path))


@contextlib.contextmanager
def _deprecated() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
