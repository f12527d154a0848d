"""Start servers as a user does, and watch what their processes use."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.calls import ask

READY_S = 120.0  # how long a server may take to answer its first request
STOP_S = 30.0  # and to stop when it is told to


@dataclass(frozen=True)
class Started:
    """A server that answers."""

    target: str  # host:port
    pid: int  # of its first process
    ready_s: float  # from the start of the process to its first answer
    log: Path


def family(pids: Sequence[int]) -> list[psutil.Process]:
    """The processes and all their descendants that live now."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            found += [process, *process.children(recursive=True)]
    return found


def cpu_s(pids: Sequence[int]) -> float:
    """CPU seconds that the processes and their descendants have used, those that ended included."""
    total = 0.0
    for process in family(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def rss_mb(pids: Sequence[int]) -> list[float]:
    """Resident memory of each process, largest first, 10^6 bytes; what processes share counts in each of them."""
    sizes = []
    for process in family(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            sizes.append(process.memory_info().rss / 1e6)
    return sorted(sizes, reverse=True)


def open_files(pids: Sequence[int]) -> int:
    """Open file descriptors of all the processes together."""
    total = 0
    for process in family(pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.num_fds()
    return total


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def started(
    command: Sequence[str], port: int, path: str, request: bytes, env: Mapping[str, str] | None = None
) -> Iterator[Started]:
    """Run a server until the block ends.

    Args:
        command: starts it.
        port: where it will listen.
        path: a method of its that answers `request` once it is ready.
        request: a message for it.
        env: of the process; this one's where not given.

    Raises:
        RuntimeError: it ended, or gave no answer within `READY_S` seconds; the text has the end of its log.
    """
    target = f"127.0.0.1:{port}"
    with tempfile.NamedTemporaryFile("w", prefix="server-", suffix=".log", delete=False) as log:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        asyncio.run(_answers(process, target, path, request, Path(log.name)))
        yield Started(target, process.pid, time.perf_counter() - began, Path(log.name))
    finally:
        _stop(process)
        Path(log.name).unlink()


async def _answers(process: subprocess.Popen[bytes], target: str, path: str, request: bytes, log: Path) -> None:
    until = time.perf_counter() + READY_S
    problem = ""
    while time.perf_counter() < until:
        if process.poll() is not None:
            problem = f"exit code {process.returncode}"
            break
        try:
            await ask(target, path, request)
            return
        except (OSError, ValueError) as error:  # not there yet, or not ready
            problem = str(error)
            await asyncio.sleep(0.01)
    end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise RuntimeError(f"{' '.join(map(str, process.args))}: {problem}\n{end}")  # type: ignore[arg-type]


def _stop(process: subprocess.Popen[bytes]) -> None:
    processes = family([process.pid])
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for left in processes[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
