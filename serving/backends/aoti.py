"""AOTInductor: a program that torch compiled to machine code when it was exported, for one kind of processor."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
import torch._inductor

from serving.backends import torch_files
from serving.backends.engine import Engine
from serving.bundle import Bundle
from serving.errors import DeviceError


def open_model(bundle: Bundle, file: str, device: str, engine: Engine) -> torch_files.TorchBackend:
    """Open a bundle's compiled package on the CPU, which it is compiled for; see `serving.backends.open_backend`."""
    return torch_files.open_with("aoti", _load, bundle, file, device, engine)


def _load(data: bytes, device: str) -> Any:
    if device != "cpu":
        raise DeviceError(f"the aoti file is compiled for the CPU and does not run on {device}: use --device cpu")
    return torch._inductor.aoti_load_package(io.BytesIO(data))


def save(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile an exported program for this machine's CPU, and write it to `path`, which ends in `.pt2`.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
