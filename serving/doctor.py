"""What this machine can serve with: versions, devices, and the providers that really run, or why they do not."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from serving import hardware
from serving.backends import cuda
from serving.errors import DeviceError

PACKAGES = ("numpy", "onnxruntime-gpu", "onnxruntime", "torch", "grpcio", "protobuf", "pillow", "pydantic")


def doctor(console: Console) -> bool:
    """Print the report; returns whether anything here can run a model."""
    print_versions(console, PACKAGES)
    print_machine(console)
    devices = cuda.device_names()
    console.print(f"CUDA devices: {escape(', '.join(devices) or str(cuda.device_problem(0)))}")
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        console.print("onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both, install one")
    problems = _providers()
    console.print("\nproviders, each asked to run a convolution:", style="bold")
    for (backend, provider), problem in problems.items():
        verdict = f"[red]no:[/red] {escape(problem)}" if problem else "[green]runs[/green]"
        console.print(f"  {backend}, {provider}: {verdict}")
    return any(problem is None for problem in problems.values())


def print_versions(console: Console, packages: Sequence[str]) -> None:
    """Print a table of Python's and the packages' versions."""
    versions = Table("package", "version", title="versions")
    versions.add_row("python", f"{sys.version.split()[0]} on {platform.system()} {platform.machine()}")
    for name in packages:
        versions.add_row(name, _version(name) or "not installed")
    console.print(versions)


def print_machine(console: Console) -> None:
    """Print the processor and the memory."""
    console.print(f"CPU: {escape(hardware.cpu().text())}", soft_wrap=True)
    memory = hardware.memory()
    console.print(f"memory: {memory.text() if memory else 'not known on this system'}", soft_wrap=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> dict[tuple[str, str], str | None]:
    """Why each provider does not run here, None where it does."""
    problems: dict[tuple[str, str], str | None] = {}
    try:
        from serving.backends import onnx
    except ImportError as error:
        problems["onnx", "onnxruntime"] = f"{error}: pip install onnxruntime-gpu"
    else:
        for provider in onnx.available_providers():
            problems["onnx", provider] = onnx.provider_problem(provider)
    try:
        from serving.backends import torch_files
    except ImportError:
        problems["torchscript, pt2, aoti", "torch"] = "torch is not installed: pip install 'parityserve[train]'"
    else:
        for device in ("cpu", "cuda:0"):
            try:
                torch_files.probe(device)
                problems["torchscript, pt2, aoti", f"torch {device}"] = None
            except DeviceError as error:
                problems["torchscript, pt2, aoti", f"torch {device}"] = str(error)
    return problems
