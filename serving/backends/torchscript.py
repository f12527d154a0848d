"""TorchScript: the only module of the project that calls torch.jit.

torch.jit is deprecated in favour of torch.export and says so at every call; those warnings are silenced here alone.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from serving.backends import torch_files
from serving.backends.engine import Engine
from serving.bundle import Bundle


def open_model(bundle: Bundle, file: str, device: str, engine: Engine) -> torch_files.TorchBackend:
    """Open a bundle's TorchScript file on `cpu` or `cuda:N`; see `serving.backends.open_backend`."""
    return torch_files.open_with("torchscript", _load, bundle, file, device, engine)


def _load(data: bytes, device: str) -> Any:
    with _deprecated():
        return torch.jit.load(io.BytesIO(data), map_location=device)


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
