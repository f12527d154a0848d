"""What several processes share of a machine: its cores, and one port."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from serving.config import ServerConfig
from serving.errors import StartupError, cannot_listen


def worker_count(config: ServerConfig) -> int:
    """The number of processes to serve with.

    `auto`: one for each usable core and `threads`; one where CUDA may run the models, as each would hold its own copy
    of them on the device.

    Raises:
        StartupError: several are asked for on a system where they cannot share a port.
    """
    count = config.workers
    if count == "auto":
        from serving.backends.cuda import device_problem  # not needed for a number

        on_cuda = config.device.startswith("cuda") or (config.device == "auto" and device_problem(0) is None)
        alone = on_cuda or sys.platform != "linux"
        return 1 if alone else max(1, usable_cores() // config.threads)
    if count > 1 and sys.platform != "linux":
        raise StartupError(f"--workers: got {count}, want 1 or auto on this system; only Linux spreads connections")
    return count


def usable_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The cores that this process may use, on Linux: those of its affinity, or fewer by its control groups' quotas.

    Args:
        cgroups: where the groups are mounted.
        own: which of them this process is in.
    """
    cores = float(len(os.sched_getaffinity(0)))
    group = next((line[3:].strip("/") for line in _lines(own) if line.startswith("0::")), "")
    folder = cgroups / group
    for level in (folder, *folder.parents):  # those beyond the mount have no such file
        for line in _lines(level / "cpu.max"):  # "200000 100000" is two cores' time, "max 100000" any
            quota, period = line.split()
            if quota != "max":
                cores = min(cores, int(quota) / int(period))
    for line in _lines(cgroups / "cpu" / "cpu.cfs_quota_us"):  # version 1, of a container; -1 is any
        period = _lines(cgroups / "cpu" / "cpu.cfs_period_us")[0]
        if int(line) > 0:
            cores = min(cores, int(line) / int(period))
    return max(1, int(cores))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@contextlib.contextmanager
def reserved(config: ServerConfig) -> Iterator[int]:
    """Hold the port to listen on, which workers may come and go on meanwhile; gives its number.

    Raises:
        StartupError: another server has it, or it is not this machine's address.
    """
    with contextlib.ExitStack() as held:
        try:
            port = config.port
            for address in _addresses(config.host):
                port = held.enter_context(_hold(address, port)).getsockname()[1]
        except OSError as error:
            raise cannot_listen(config.address) from error
        yield port


def _hold(address: str, port: int) -> socket.socket:
    """A socket bound to an address while no other server is, and never listening, so that it gets no connection."""
    holder = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        if ":" in address:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are about to end do no harm
        holder.bind((address, port))
        # Bound alone, and only now open to workers. Another server could be let in by no other order.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        holder.close()
        raise
    return holder


def _addresses(host: str) -> list[str]:
    """What gRPC listens on for a host: every interface is IPv6 and IPv4 at once, and so is localhost."""
    if host in ("0.0.0.0", "::"):
        return ["::" if socket.has_dualstack_ipv6() else "0.0.0.0"]
    if host == "localhost":
        return ["127.0.0.1", *(["::1"] if _is_here("::1") else [])]
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_here(address: str) -> bool:
    try:
        _hold(address, 0).close()
    except OSError:
        return False
    return True
