"""Several processes that share one port: what becomes their supervisor, and what each of them runs.

The supervisor holds the port and serves nothing itself. Each worker is a process, forked by one that has imported
everything and has no threads, that runs `serving.server` on the same port with SO_REUSEPORT: the kernel spreads the
connections. A socket pair ties each of them to the supervisor; its end tells either side of the death of the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from typing import TYPE_CHECKING

from serving import logs
from serving.channel import Gone
from serving.config import ServerConfig
from serving.control import Member
from serving.errors import ParityserveError
from serving.forks import Forks
from serving.machine import reserved
from serving.supervisor import Supervisor

if TYPE_CHECKING:
    from serving.snapshot import Snapshot

logger = logging.getLogger(__name__)


def supervise(config: ServerConfig, count: int) -> None:
    """Serve with `count` processes until SIGTERM or SIGINT, then drain; a second signal cuts the draining short.

    Raises:
        StartupError, DeviceError, BundleError: the server cannot start.
        ParityserveError: a worker died, or had to be killed, while it drained.
    """
    with Forks(_prepare, _work) as forks:
        asyncio.run(_supervise(config, count, forks))


async def _supervise(config: ServerConfig, count: int, forks: Forks) -> None:
    loop = asyncio.get_running_loop()
    with reserved(config) as port:
        config = config.model_copy(update={"port": port})
        supervisor = Supervisor(config, count, forks)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, supervisor.stop.ask)
        loop.add_signal_handler(signal.SIGHUP, supervisor.reload)
        logger.info("%d workers on %s load models from %s", count, config.address, config.repository)
        with contextlib.ExitStack() as ending:
            if config.metrics_port is not None:
                from serving import metrics

                def snapshot() -> Snapshot:
                    return asyncio.run_coroutine_threadsafe(supervisor.snapshot(), loop).result()

                ending.callback(metrics.start(config, config.metrics_port, snapshot).close)
            await supervisor.run()
    logger.info("stopped")


def _prepare() -> None:
    """Import what serves, but for ONNX Runtime: it starts a thread."""
    import serving.server  # noqa: F401  # the supervisor does without


def _work(end: socket.socket) -> int:
    """Be a worker; `end` is its end of the socket pair. Returns the exit code."""
    from serving.server import run

    return run(_serve(end))


async def _serve(end: socket.socket) -> int:
    from serving.server import serve_here

    member = Member()
    try:
        role = await member.connect(end)
        logs.configure(role.config, role.number)
        try:
            await serve_here(role.config, member)
        except ParityserveError as error:
            await member.failed(error)
            return 1
    except Gone:  # the supervisor, while this worker started
        return 1
    return 0
