"""torch.export's own file, `.pt2`: TorchScript's successor, loaded with `torch.export.load`."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from serving.backends import torch_files
from serving.backends.engine import Engine
from serving.bundle import Bundle


def open_model(bundle: Bundle, file: str, device: str, engine: Engine) -> torch_files.TorchBackend:
    """Open a bundle's pt2 file on `cpu` or `cuda:N`; see `serving.backends.open_backend`."""
    return torch_files.open_with("pt2", _load, bundle, file, device, engine)


def _load(data: bytes, device: str) -> Any:
    program = torch.export.load(io.BytesIO(data))
    return move_to_device_pass(program, device).module()


def exported_program(module: torch.nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    """The graph of `module` for a batch of any size.

    Args:
        module: in eval mode, on the CPU, without data-dependent control flow.
        example: an input of at least two images, so that no axis is mistaken for a constant 1.
    """
    return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def save(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported program to `path`, which ends in `.pt2`."""
    with warnings.catch_warnings():
        # Of a kernel that lies channels last, which torch does not take for a complete tensor; it is, and on the CPU.
        warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
        torch.export.save(program, path)
