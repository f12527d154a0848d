"""What the three backends share that run a file with torch: TorchScript, torch.export's pt2, AOTInductor's package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from serving.backends import cuda
from serving.backends.engine import Engine
from serving.bundle import Bundle
from serving.errors import BundleError, DeviceError
from serving.tensors import Array, TensorSpec


class TorchBackend:
    """What torch loaded, behind the `Backend` protocol."""

    provider = "torch"

    def __init__(
        self,
        name: str,
        file: str,
        module: Callable[..., Sequence[torch.Tensor]],
        device: torch.device,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        tf32: bool,
    ) -> None:
        self.name = name
        self.tf32 = tf32
        self.file = file
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
            raise BundleError(f"{self.file} does not run: {error}") from error
        self.device = str(answers[0].device)  # read back
        if self.device != str(device):
            raise DeviceError(f"{self.file} was opened on {device} and answers on {self.device}")
        for spec, answer in zip(outputs, answers, strict=False):
            if answer.cpu().numpy().dtype != spec.dtype or not spec.accepts(tuple(answer.shape)):
                raise BundleError(f"{self.file}'s {spec.name} is {answer.dtype} {list(answer.shape)}")
        if len(answers) != len(outputs):
            raise BundleError(f"{self.file} has {len(answers)} outputs, the manifest {len(outputs)}")
        self.settings = {"threads": str(torch.get_num_threads())}
        if device.type == "cuda":
            self.settings |= {
                "matmul.fp32_precision": torch.backends.cuda.matmul.fp32_precision,
                "cudnn.conv.fp32_precision": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            }

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Backend.run`."""
        tensors = self._forward(inputs)
        return {spec.name: tensor.cpu().numpy() for spec, tensor in zip(self.outputs, tensors, strict=True)}

    def _forward(self, inputs: Mapping[str, Array]) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            # A copy: an array that came off the wire is read-only, and torch has no read-only tensors.
            arguments = [torch.tensor(inputs[spec.name], device=self._device) for spec in self.inputs]
            return tuple(self._module(*arguments))


def open_with(
    name: str,
    load: Callable[[bytes, str], Callable[..., Sequence[torch.Tensor]]],
    bundle: Bundle,
    file: str,
    device: str,
    engine: Engine,
) -> TorchBackend:
    """Open a bundle's file on `cpu` or `cuda:N`; see `serving.backends.open_backend`.

    Args:
        name: the backend's.
        load: makes what can be called of the file's bytes, for a device.
        file: its name in the bundle.
    """
    probe(device, engine.tf32)
    data = bundle.read(file)
    try:
        module = load(data, device)
    except DeviceError:
        raise
    except Exception as error:  # each of torch's loaders has errors of its own
        raise BundleError(f"{bundle.path / file}: torch cannot open it: {error}") from error
    torch.set_num_threads(engine.threads)  # of the whole process: torch knows no other
    return TorchBackend(
        name, file, module, torch.device(device), bundle.manifest.inputs, bundle.manifest.outputs, engine.tf32
    )


def probe(device: str, tf32: bool = False) -> None:
    """Run a convolution on `cpu` or `cuda:N`, and say there, for the whole process, whether TF32 may be used.

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
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"  # type: ignore[attr-defined]  # missing in the stubs
    try:
        ones = torch.ones(1, 1, 4, 4, device=device)
        torch.nn.functional.conv2d(ones, ones).cpu()
    except RuntimeError as error:
        raise DeviceError(f"torch does not run on {device}: {error}") from error
