"""One server process at one moment: what its metrics are made of. Snapshots of several processes can be combined."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

from serving.repository import UNLOADED, Repository, State, Status
from serving.statistics import Rpcs, Statistics, merge

_PROC = Path("/proc/self")

Value = TypeVar("Value")


class Key(NamedTuple):
    """What a version is known by."""

    model: str
    version: str


class RunsOn(NamedTuple):
    """What a version really runs on, as read back from it, and whether golden answers vouch for that."""

    backend: str
    provider: str
    device: str
    verified: bool


@dataclass(frozen=True)
class Version:
    """One version as it stands."""

    state: State
    reason: str = ""  # as a `Status` has it
    runs_on: frozenset[RunsOn] = frozenset()  # several where processes differ; none while it is not served
    golden_max_abs: float | None = None
    waiting: int = 0  # requests
    running: int = 0
    nbytes: int = 0  # of the inputs of both


@dataclass(frozen=True)
class Process:
    """What a process uses. A figure that the system does not tell is 0."""

    cpu_s: float = 0.0
    resident_bytes: int = 0
    open_fds: int = 0
    started_s: float = 0.0  # since 1970


@dataclass(frozen=True)
class Snapshot:
    """One server process, or several combined. It shares nothing with the running server, and can be pickled."""

    ready: bool
    workers: int  # processes
    versions: dict[Key, Version] = field(default_factory=dict)
    statistics: dict[Key, Statistics] = field(default_factory=dict)
    rpcs: Rpcs = field(default_factory=Rpcs)
    process: Process = Process()


def collect(repository: Repository, rpcs: Rpcs, ready: bool) -> Snapshot:
    """This process; may be called by any thread. A version that was unloaded is not in it."""
    statuses = [status for status in repository.statuses() if status.reason != UNLOADED]
    counted = Rpcs()
    counted.include(rpcs)
    return Snapshot(
        ready=ready,
        workers=1,
        versions={Key(status.name, status.version): _version(status) for status in statuses},
        statistics={
            Key(status.name, status.version): merge([status.served.statistics]) for status in statuses if status.served
        },
        rpcs=counted,
        process=_process(),
    )


def _version(status: Status) -> Version:
    if status.served is None:
        return Version(status.state, status.reason)
    backend, golden = status.served.backend, status.served.golden
    queue = status.served.scheduler.queue
    return Version(
        state=status.state,
        reason=status.reason,
        runs_on=frozenset({RunsOn(backend.name, backend.provider, backend.device, status.served.verified)}),
        golden_max_abs=golden.max_abs if golden else None,
        waiting=len(queue),
        running=queue.running,
        nbytes=queue.nbytes,
    )


def _process() -> Process:
    """What this process uses."""
    resident_bytes, open_fds, started_s = 0, 0, 0.0
    with contextlib.suppress(OSError):  # no Linux
        resident_bytes = int((_PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        open_fds = len(list((_PROC / "fd").iterdir()))
        started_s = _started_s(os.getpid())
    return Process(time.process_time(), resident_bytes, open_fds, started_s)


@functools.cache  # the clocks drift: asked again, it would look like a restart
def _started_s(pid: int) -> float:
    """When a process of this machine was started, in seconds since 1970."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # since the boot
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s


def combine(snapshots: Iterable[Snapshot]) -> Snapshot:
    """Several processes as if they were one: counts and queues are sums, and it is ready when all are."""
    parts = list(snapshots)
    rpcs = Rpcs()
    for part in parts:
        rpcs.include(part.rpcs)
    return Snapshot(
        ready=all(part.ready for part in parts),
        workers=sum(part.workers for part in parts),
        versions={key: _combined(found) for key, found in _by_key(part.versions for part in parts).items()},
        statistics={key: merge(found) for key, found in _by_key(part.statistics for part in parts).items()},
        rpcs=rpcs,
        process=Process(
            cpu_s=sum(part.process.cpu_s for part in parts),
            resident_bytes=sum(part.process.resident_bytes for part in parts),
            open_fds=sum(part.process.open_fds for part in parts),
            started_s=min((part.process.started_s for part in parts if part.process.started_s), default=0.0),
        ),
    )


def ended(snapshot: Snapshot) -> Snapshot:
    """What is left of a process that has ended: its counts.

    They have to stay in what is combined from then on: a count that falls looks like a restart from 0 to Prometheus.
    """
    return replace(snapshot, ready=True, workers=0, versions={}, process=Process(cpu_s=snapshot.process.cpu_s))


def _by_key(parts: Iterable[dict[Key, Value]]) -> dict[Key, list[Value]]:
    found: dict[Key, list[Value]] = {}
    for part in parts:
        for key, value in part.items():
            found.setdefault(key, []).append(value)
    return found


def _combined(versions: list[Version]) -> Version:
    """One version in several processes: what is not READY anywhere is not READY."""
    worst = next((version for version in versions if version.state is not State.READY), versions[0])
    differences = [version.golden_max_abs for version in versions if version.golden_max_abs is not None]
    return Version(
        state=worst.state,
        reason=worst.reason,
        runs_on=frozenset().union(*(version.runs_on for version in versions)),
        golden_max_abs=max(differences, default=None),
        waiting=sum(version.waiting for version in versions),
        running=sum(version.running for version in versions),
        nbytes=sum(version.nbytes for version in versions),
    )
