"""What a measurement was made on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from pathlib import Path

import psutil

_PACKAGES = ("parityserve", "onnxruntime", "onnxruntime-gpu", "grpcio", "protobuf", "numpy", "uvloop")


def describe() -> dict[str, str]:
    """Processor, cores, memory, system, and the versions of what the servers run on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = {
        "processor": _processor(),
        "cores": str(cores),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
    }
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[name] = importlib.metadata.version(name)
    return about


class Stolen:
    """How much CPU time the host of a virtual machine has kept from it since this was made.

    A virtual core that sleeps can be given to others, and be waited for when there is work again: what wakes up often
    loses more than what computes. On a machine of one's own it is 0, as where the system does not tell (Linux does).
    """

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._stolen_s = _stolen_s()

    def share(self) -> float:
        """Of the time of all cores together."""
        elapsed_s = (time.monotonic() - self._began_s) * (os.cpu_count() or 1)
        return (_stolen_s() - self._stolen_s) / elapsed_s


def _stolen_s() -> float:
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
