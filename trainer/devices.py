"""Where training runs, and how torch behaves there."""

from __future__ import annotations

import os

import torch

from serving.backends.cuda import device_problem
from serving.errors import DeviceError


def select_device(spec: str) -> tuple[torch.device, str]:
    """The device to train on and why.

    Args:
        spec: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`; only `auto` falls back.

    Raises:
        DeviceError: the device named is not here; the text has the cause.
    """
    kind, _, index = spec.partition(":")
    if kind == "cpu":
        return torch.device("cpu"), "asked for"
    cuda_problem = device_problem(int(index or 0))
    if cuda_problem is None and not torch.cuda.is_available():
        cuda_problem = f"torch {torch.__version__} (built for CUDA {torch.version.cuda}) finds no CUDA device"
    if kind == "cuda":
        if cuda_problem:
            raise DeviceError(cuda_problem)
        return torch.device("cuda", int(index or 0)), "asked for"
    mps = torch.backends.mps.is_available()
    if kind == "mps":
        if not mps:
            raise DeviceError("mps: torch finds no Apple GPU here; use --device auto or cpu")
        return torch.device("mps"), "asked for"
    if cuda_problem is None:
        return torch.device("cuda", 0), "auto: the driver offers it and torch uses it"
    if mps:
        return torch.device("mps"), "auto: an Apple GPU"
    return torch.device("cpu"), f"auto: {cuda_problem}"


def set_deterministic(deterministic: bool = True, compiled: bool = False) -> None:
    """Have torch use, in the whole process, fp32 without TF32, and algorithms that give the same bits every time.

    Args:
        deterministic: without, torch may use TF32 and pick the fastest algorithms of the moment.
        compiled: whether the network will be compiled; the compiler has to be told too, and takes seconds to import.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without
    # torch has an older and a newer name for each, and torch.export and torch.compile fail where the two disagree.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not deterministic
    precision = "ieee" if deterministic else "tf32"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]  # missing in the stubs
    torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]  # missing in the stubs
    if compiled:
        torch.use_deterministic_algorithms(deterministic)
    else:
        torch.set_deterministic_debug_mode("error" if deterministic else "default")
    # Nothing here reads what it has not written, so new memory need not be filled.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # missing in the stubs
    torch.backends.cudnn.benchmark = not deterministic
