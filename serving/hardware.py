"""The machine's processor and memory, as far as they matter to a network: asked of Linux, less is known elsewhere."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")

# What /proc/cpuinfo calls what makes networks fast: (what, x86-64, 64-bit Arm).
EXTENSIONS = (
    ("AVX2", "avx2", None),
    ("AVX-512", "avx512f", None),
    ("SVE", None, "sve"),
    ("int8 dot products (VNNI)", "avx512_vnni", "asimddp"),
    ("bf16", "avx512_bf16", "bf16"),
    ("AMX bf16", "amx_bf16", None),
    ("AMX int8", "amx_int8", None),
)


@dataclass(frozen=True)
class Cpu:
    """The processor."""

    name: str
    cores: int  # logical, in the machine
    usable: float  # by this process: its affinity, and its container's share of time
    has: tuple[str, ...]  # of EXTENSIONS
    lacks: tuple[str, ...]

    def text(self) -> str:
        """In one line."""
        usable = "" if self.usable == self.cores else f", of which this process may use {self.usable:g}"
        known = f"; has {', '.join(self.has) or 'nothing'}; lacks {', '.join(self.lacks) or 'nothing'}"
        unknown = "; its extensions are not known on this system"
        return f"{self.name}, {self.cores} cores{usable}{known if self.has or self.lacks else unknown}"


@dataclass(frozen=True)
class Memory:
    """Main memory, bytes."""

    total: int  # of the machine, or of the container where that is less
    free: int | None  # for new programs without swapping; None where it is not known

    def text(self) -> str:
        """In one line."""
        free = "" if self.free is None else f", {self.free / 2**30:.1f} GiB free"
        return f"{self.total / 2**30:.1f} GiB{free}"


def cpu(proc: Path = PROC, cgroup: Path = CGROUP) -> Cpu:
    """The processor of this machine."""
    facts = _facts(proc / "cpuinfo")
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    arm = "Features" in facts
    offered = [(what, on_arm if arm else on_x86) for what, on_x86, on_arm in EXTENSIONS]
    cores = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores)
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")  # "150000 100000": one and a half cores
    if quota.isdigit():
        usable = min(usable, int(quota) / int(period))
    return Cpu(
        name=facts.get("model name") or platform.processor() or platform.machine(),
        cores=cores,
        usable=usable,
        has=tuple(what for what, flag in offered if flag in flags),
        lacks=tuple(what for what, flag in offered if flag and flag not in flags) if flags else (),
    )


def memory(proc: Path = PROC, cgroup: Path = CGROUP) -> Memory | None:
    """The memory of this machine; None where it cannot be asked."""
    facts = _facts(proc / "meminfo")
    if "MemTotal" not in facts:
        names = getattr(os, "sysconf_names", {})
        if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
            return None
        return Memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None)
    total, free = (1024 * int(facts[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    limit = _read(cgroup / "memory.max")
    if limit.isdigit() and int(limit) < total:
        used = _read(cgroup / "memory.current")
        total = int(limit)
        free = min(free, total - int(used)) if used.isdigit() else min(free, total)
    return Memory(total, free)


def _facts(path: Path) -> dict[str, str]:
    """The lines `name : value` of a file of /proc, the first of each name; none where there is no such file."""
    facts: dict[str, str] = {}
    for line in _read(path).splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
