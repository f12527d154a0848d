"""Which versions of a model should be served, and what a look at the repository's folder finds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving import bundle as bundles
from serving.errors import BundleError, InvalidArgument

_POLICY = re.compile(
    r"latest(?::(?P<latest>[1-9]\d{0,8}))?|all|labels|specific:(?P<specific>[1-9]\d{0,8}(,[1-9]\d{0,8})*)"
)


@dataclass(frozen=True)
class VersionPolicy:
    """Which of a model's versions are served."""

    kind: Literal["latest", "all", "labels", "specific"]
    numbers: tuple[int, ...] = ()  # latest: how many; specific: which

    @classmethod
    def parse(cls, text: str) -> VersionPolicy:
        """The policy that `latest`, `latest:N`, `all`, `labels` or `specific:N,N` stands for.

        Raises:
            ValueError: it is none of these.
        """
        match = _POLICY.fullmatch(text)
        if match is None:
            raise ValueError("want latest, latest:N, all, labels or specific:N,N with version numbers from 1")
        if match["specific"]:
            return cls("specific", tuple(sorted({int(number) for number in match["specific"].split(",")})))
        if text in ("all", "labels"):
            return cls("all" if text == "all" else "labels")
        return cls("latest", (int(match["latest"] or 1),))

    def select(self, versions: Collection[int], labelled: Collection[int] = ()) -> set[int]:
        """Those of `versions` that should be served: what a label means is, whatever the policy."""
        named = set(versions) & set(labelled)
        match self.kind:
            case "latest":
                return named | set(sorted(versions)[-self.numbers[0] :])
            case "specific":
                return named | (set(versions) & set(self.numbers))
            case "all":
                return set(versions)
            case "labels":
                return named


def version_number(version: str, labels: Collection[str] = ()) -> str:
    """A version that a request names, as it is written in the repository: without leading zeros.

    Args:
        version: what the request has.
        labels: what it could have instead.

    Raises:
        InvalidArgument: it is not a number; the text is Triton's.
    """
    if not version:
        return ""
    if not (len(version) < 20 and version.isascii() and version.isdigit() and int(version) > 0):
        raise InvalidArgument(
            f"failed to get model version from specified version string '{version[:100]}', "
            "version should be an integral value > 0"
            + (f" or a label of the model: {', '.join(sorted(labels))}" if labels else "")
        )
    return str(int(version))


@dataclass(frozen=True)
class Files:
    """The files of a version's folder at one moment; equal to those of another as long as nothing was changed."""

    stats: tuple[tuple[str, int, int, int], ...]  # name, size in bytes, time of change in ns, inode; by name

    def complete(self, allow_plain: bool) -> bool:
        """Whether there is a manifest, which is written last; or where that will do, an ONNX file."""
        names = {name for name, *_ in self.stats}
        return bundles.MANIFEST in names or (allow_plain and bundles.ONNX in names)


Seen = dict[str, dict[int, Files]]  # by model and version


def look(repository: Path, models: Collection[str] = ()) -> Seen:
    """The versions in a repository, complete or not, and their files; only of `models`, where some are named.

    Raises:
        BundleError: there is no such repository.
        OSError: a folder in it cannot be read.
    """
    names = [name for name in bundles.models(repository) if name in models or not models]
    return {name: _versions(repository / name) for name in names}


def _versions(model: Path) -> dict[int, Files]:
    found = {}
    for number in bundles.versions(model):
        with contextlib.suppress(FileNotFoundError):  # it was removed since
            found[number] = Files(tuple(sorted(_stat(path) for path in (model / str(number)).iterdir())))
    return found


def _stat(path: Path) -> tuple[str, int, int, int]:
    try:
        stat = path.stat()
    except OSError:  # it was removed since, or is a link to nothing
        return path.name, -1, 0, 0
    return path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino


def check_inside(repository: Path, folder: Path) -> None:
    """Refuse a version that symbolic links lead out of the repository.

    Raises:
        BundleError: the version's folder, the model's, or a file in it lies elsewhere; or it cannot be read.
    """
    root = repository.resolve()
    try:
        paths = [folder, *folder.iterdir()]
    except OSError as error:
        raise BundleError(f"{folder}: {error.strerror}") from error
    for path in paths:
        if not (target := path.resolve()).is_relative_to(root):
            raise BundleError(
                f"{path}: leads to {target}, outside the repository {root}; "
                "put a copy inside, or link to something inside"
            )
