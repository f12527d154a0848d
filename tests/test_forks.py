"""The process that forks workers: real processes, signals, exit codes and limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Runs by itself, as `Forks` is to be made on the only thread of a process.
PROGRAM = """
import asyncio, os, resource, signal, socket, sys
from serving.forks import Forks

def prepare():
    print("prepared by", os.getpid(), flush=True)

def run(end):
    end.sendall(b"%d %d" % (os.getpid(), os.getpgid(0)))  # tells what it is, and ends as it is told
    return int(end.recv(10) or b"0")

class Process:
    async def begin(self, forks):
        self.end, theirs = socket.socketpair()
        self.end.settimeout(30)
        with theirs:
            self.forked = await forks.fork(theirs)
        pid, group = map(int, self.end.recv(100).split())
        assert pid == group == self.forked.pid != os.getpid()
        return self

    async def wait(self):
        return await asyncio.wait_for(self.forked.wait(), 30)

async def main(forks):
{body}

with Forks(prepare, run) as forks:
    asyncio.run(main(forks))
print("done")
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has several workers")


def run(body: str) -> list[str]:
    """The lines that the program prints."""
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    words = [sys.executable, "-c", PROGRAM.replace("{body}", indented)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_process_prepares_and_forks_all_others():
    lines = run("""
parents = set()
for _ in range(3):
    process = await Process().begin(forks)
    with open(f"/proc/{process.forked.pid}/stat") as file:
        parents.add(int(file.read().rpartition(")")[2].split()[1]))
    process.end.close()
    assert await process.wait() == 0
print(*parents)
""")
    prepared, parents, done = lines
    assert prepared == f"prepared by {parents}"  # one number: all have the same parent
    assert int(parents) != os.getpid()
    assert done == "done"


def test_how_a_process_ended_is_told_as_of_ones_own():
    lines = run("""
told, failed, killed, asked, left = [await Process().begin(forks) for _ in range(5)]
told.end.sendall(b"7")
failed.end.sendall(b"no number")
killed.forked.kill()
asked.forked.send_signal(signal.SIGTERM)  # that the process which forks ignores
print(*[await process.wait() for process in (told, failed, killed, asked)])
try:
    os.kill(killed.forked.pid, 0)
except ProcessLookupError:
    print("nothing of it is left")
left.end.close()
print(await left.wait())
""")
    assert lines[1:] == ["7 1 -9 -15", "nothing of it is left", "0", "done"]


def test_a_process_that_cannot_be_had_is_an_error_and_leaves_none_behind():
    lines = run("""
first = await Process().begin(forks)
forker = int(open(f"/proc/{first.forked.pid}/stat").read().rpartition(")")[2].split()[1])
limit = resource.getrlimit(resource.RLIMIT_NOFILE)
for victim, room in ((os.getpid(), 0), (forker, 0), (forker, 1)):  # for the new process's end, and no descriptor of it
    ours, theirs = socket.socketpair()
    count = len(os.listdir(f"/proc/{victim}/fd")) - (victim == os.getpid())  # without that of the listing
    resource.prlimit(victim, resource.RLIMIT_NOFILE, (count + room, limit[1]))
    try:
        await forks.fork(theirs)
    except OSError as error:
        print(error)
    resource.prlimit(victim, resource.RLIMIT_NOFILE, limit)
    theirs.close()
    ours.settimeout(30)
    while ours.recv(100):  # until nobody has its other end
        pass
again = await Process().begin(forks)
for process in (first, again):
    process.end.close()
    print(await process.wait())
""")
    assert lines[1:] == ["[Errno 24] Too many open files"] * 3 + ["0", "0", "done"]


def test_who_has_ended_need_not_get_a_signal():
    lines = run("""
process = await Process().begin(forks)
process.end.close()
print(await process.wait())
process.forked.send_signal(signal.SIGHUP)
process.forked.kill()
""")
    assert lines[1:] == ["0", "done"]


def test_without_the_process_that_forks_those_it_forked_live_on():
    lines = run("""
process = await Process().begin(forks)
forker = int(open(f"/proc/{process.forked.pid}/stat").read().rpartition(")")[2].split()[1])
os.kill(forker, signal.SIGKILL)
for _ in range(2):
    try:
        await Process().begin(forks)
    except OSError as error:
        print(error)
process.end.sendall(b"0")
print(await process.wait())  # nobody knows
""")
    assert lines[1:] == ["the process that forks workers has ended; start the server again"] * 2 + ["1", "done"]
