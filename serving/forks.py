"""A process that has imported what every worker needs, and forks one whenever it is asked: most of a start is imports.

It is forked itself before there is a thread or an event loop, and never has any: what it forks is as good as fresh.
Linux only, as several workers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import logging
import os
import signal
import socket
import struct
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

_NEW = 0
_ASK = struct.Struct("!i")  # the id of a process that has ended, for its exit code; or _NEW, with a socket
_ANSWER = struct.Struct("!ii")  # a process id or an exit code, and 0 or the number of an error
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a terminal or a service manager may send them to all


class Forked:
    """A process that was forked."""

    def __init__(self, forks: Forks, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._forks = forks
        # Of the process: it cannot be mistaken for another that has its number later. -1: it has ended, and was closed.
        self._descriptor = descriptor

    def send_signal(self, number: int) -> None:
        """Send a signal; one that has ended need not get it."""
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    async def wait(self) -> int:
        """Return its exit code when it has ended, or minus the signal that ended it; to be called once."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        return await self._forks.code(self.pid)


class Forks:
    """Asks the process that forks. Made while there is but one thread; left when all that was forked has ended."""

    def __init__(self, prepare: Callable[[], object], run: Callable[[socket.socket], int]) -> None:
        """Fork it.

        Args:
            prepare: called once in that process, to import what takes long.
            run: called in each process that it forks, with the socket that `fork` was given; gives the exit code.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._end = ours
        self._asking = asyncio.Lock()
        self._pid = os.fork()
        if self._pid == 0:
            ours.close()
            _leave(functools.partial(_serve, theirs, prepare, run))
        theirs.close()

    async def fork(self, end: socket.socket) -> Forked:
        """One more process, in a group of its own, that runs with `end`.

        Raises:
            OSError: there cannot be one.
        """
        pid, descriptors = await self._ask(_NEW, [end.fileno()])
        if not descriptors:  # this process may open no more files, and got none
            os.kill(pid, signal.SIGKILL)
            await self.code(pid)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return Forked(self, pid, descriptors[0])

    async def code(self, pid: int) -> int:
        """The exit code of a process that has ended; 1 where nobody is left who knows it."""
        try:
            return (await self._ask(pid, []))[0]
        except OSError:
            return 1

    async def _ask(self, number: int, descriptors: list[int]) -> tuple[int, list[int]]:
        def ask() -> tuple[bytes, list[int]]:
            try:
                socket.send_fds(self._end, [_ASK.pack(number)], descriptors)
                message, given, _, _ = socket.recv_fds(self._end, _ANSWER.size, 1)
            except ConnectionError:
                return b"", []
            return message, given

        async with self._asking:  # one at a time: an answer does not say what it answers
            message, given = await asyncio.to_thread(ask)  # it does not answer before it is prepared
        if not message:
            raise BrokenPipeError("the process that forks workers has ended; start the server again")
        answer, error = _ANSWER.unpack(message)
        if error:
            raise OSError(error, os.strerror(error))
        return answer, given

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.close()  # which ends it
        os.waitpid(self._pid, 0)


def _serve(asks: socket.socket, prepare: Callable[[], object], run: Callable[[socket.socket], int]) -> int:
    """Fork when asked to, until nobody is left to ask."""
    os.setpgid(0, 0)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    prepare()
    gc.collect()
    gc.freeze()  # what all share stays shared: the collector of a worker need not write to it
    while True:
        message, given, _, _ = socket.recv_fds(asks, _ASK.size, 1)
        if not message:
            return 0
        (number,) = _ASK.unpack(message)
        answer, error, descriptors = 0, 0, []
        try:
            if number == _NEW:
                if not given:  # this process may open no more files, and got none
                    raise OSError(errno.EMFILE, "")
                answer = os.fork()
                if answer == 0:
                    asks.close()
                    _leave(functools.partial(_run, run, given[0]))
                descriptors = [_descriptor(answer)]
            else:
                answer = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        except OSError as raised:
            error = raised.errno or errno.EIO
        try:
            socket.send_fds(asks, [_ANSWER.pack(answer, error)], descriptors)
        except ConnectionError:
            return 0
        for descriptor in (*given, *descriptors):
            os.close(descriptor)


def _descriptor(pid: int) -> int:
    """Of a process that was just forked; where there can be none, it is ended."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _run(run: Callable[[socket.socket], int], descriptor: int) -> int:
    """In a process that was forked for it."""
    os.setpgid(0, 0)  # a terminal's Ctrl-C is for the supervisor
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    return run(socket.socket(fileno=descriptor))


def _leave(work: Callable[[], int]) -> NoReturn:
    """Work, and end the process, whatever comes of it: what called the function that forked is for the other one."""
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        os._exit(code)
