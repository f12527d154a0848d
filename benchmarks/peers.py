"""Other Python servers, each with the same model, in an environment of its own that is made when first asked for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contenders import Contender
from benchmarks.processes import free_port

SERVERS = Path(__file__).parent / "peer_servers"
# The versions that the figures in docs/performance.md were measured with.
PACKAGES = {"mlserver": "mlserver==1.7.1", "kserve": "kserve==0.21.0", "pytriton": "nvidia-pytriton==0.7.0"}


class PeerError(Exception):
    """A peer cannot be installed here; pip says why above."""


@contextmanager
def peer(name: str, onnx: Path, model: str, base: str = sys.executable) -> Iterator[Contender]:
    """A peer that serves `onnx` under the name `model`, installed if it is not yet; `base` is as for `install`.

    Raises:
        PeerError: it cannot be installed.
    """
    python = install(name, base)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
        command, env = _COMMANDS[name](python, onnx.resolve(), model, port, Path(folder))
        about = {"package": PACKAGES[name], "onnxruntime": _onnxruntime_version()}
        yield Contender(name, command, port, streams=False, env={**os.environ, **env}, about=about)


def install(name: str, base: str = sys.executable) -> Path:
    """The Python of a peer's environment in the user's cache folder, made by the interpreter `base`.

    Raises:
        PeerError: the environment cannot be made, or pip failed.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    wanted = [PACKAGES[name], f"onnxruntime=={_onnxruntime_version()}"]
    folder = cache / "parityserve" / "peers" / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    stamp = folder / "installed.json"  # written last
    if stamp.exists() and json.loads(stamp.read_text()) == [base, *wanted]:
        return python
    print(f"installing {' and '.join(wanted)} in {folder}")
    commands: list[list[str | Path]] = [
        [base, "-m", "venv", "--clear", folder],
        [python, "-m", "pip", "install", "--progress-bar", "on", *wanted],
    ]
    for command in commands:
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PeerError(f"{name}: {error}; the reason stands above") from error
    stamp.write_text(json.dumps([base, *wanted]))
    return python


def _onnxruntime_version() -> str:
    """That of this environment, so that the model runs on the same code everywhere."""
    try:
        return importlib.metadata.version("onnxruntime")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("onnxruntime-gpu")


Command = tuple[list[str], dict[str, str]]  # and what its environment has besides


def _mlserver(python: Path, onnx: Path, model: str, port: int, folder: Path) -> Command:
    settings = {
        "host": "127.0.0.1",
        "grpc_port": port,
        "http_port": free_port(),
        "metrics_port": free_port(),
        "parallel_workers": 0,
    }
    described = {
        "name": model,
        "implementation": "mlserver_onnx.OnnxModel",
        "parameters": {"uri": str(onnx), "version": "1"},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "model-settings.json").write_text(json.dumps(described))
    return [str(python.with_name("mlserver")), "start", str(folder)], {"PYTHONPATH": str(SERVERS)}


def _kserve(python: Path, onnx: Path, model: str, port: int, _: Path) -> Command:
    return [str(python), str(SERVERS / "kserve_onnx.py"), str(onnx), model, str(port), str(free_port())], {}


def _pytriton(python: Path, onnx: Path, model: str, port: int, _: Path) -> Command:
    """Its backend embeds a Python that it takes from the dynamic linker: it must be the environment's own."""
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libraries = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
    ports = [str(port), str(free_port()), str(free_port())]
    command = [str(python), str(SERVERS / "pytriton_onnx.py"), str(onnx), model, *ports]
    return command, {"LD_LIBRARY_PATH": libraries}


_COMMANDS: dict[str, Callable[[Path, Path, str, int, Path], Command]] = {
    "mlserver": _mlserver,
    "kserve": _kserve,
    "pytriton": _pytriton,
}
