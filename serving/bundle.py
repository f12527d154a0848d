"""The bundle format: one model version on disk, `<repository>/<model>/<version>/`, and how it is read and written.

    manifest.json   what the version is, and the sha256 of every other file but the next
    manifest.sha256 the sha256 of manifest.json, as `sha256sum --check` reads it; format 1 had none
    model.onnx      fp32, one file, batch axis named `batch`
    model.*         other artefacts of the same network and signature: see `ARTEFACTS`
    weights.pt      the network's parameters, from which eager PyTorch, the reference, is rebuilt
    golden.npz      arrays `image` uint8 [G,1,28,28] and `logits` float32 [G,10], what eager PyTorch answered on the
                    CPU; and by the name of an int8 file, what that answered there
    labels.txt      one class name a line
    history.json    losses and accuracies of every epoch of the training
    README.md       the model card: what the version is and how good, for people

A version appears under its number complete, by one rename, and is never rewritten.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from serving.errors import BundleError
from serving.tensors import TensorSpec

MANIFEST = "manifest.json"
ONNX = "model.onnx"
MANIFEST_SHA256 = "manifest.sha256"
GOLDEN = "golden.npz"
LABELS = "labels.txt"
HISTORY = "history.json"
CARD = "README.md"

Precision = Literal["fp32", "fp16", "int8"]
# The file that a backend runs at a precision; a version has those that were asked for when it was exported.
ARTEFACTS: dict[tuple[str, Precision], str] = {
    ("onnx", "fp32"): ONNX,
    ("onnx", "fp16"): "model.fp16.onnx",
    ("onnx", "int8"): "model.int8.onnx",
    ("torchscript", "fp32"): "model.pt",
    ("pt2", "fp32"): "model.pt2",
    ("aoti", "fp32"): "model.aoti.pt2",
}

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParityFigures(_Record):
    """How a file's answers compared with eager PyTorch's when it was exported."""

    device: str
    n: int
    batch_sizes: tuple[int, ...]
    max_abs: float
    mean_abs: float
    top1_agreement: float


class FileEntry(_Record):
    """One file of a bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int
    backend: Literal["onnx", "torchscript", "pt2", "aoti", "eager"] | None = None  # what runs it; None for data
    precision: Precision | None = None
    parity: ParityFigures | None = None


class Accuracy(_Record):
    """Accuracy on a test set."""

    value: float = Field(ge=0, le=1)
    n: int = Field(ge=1)


class Manifest(_Record):
    """`manifest.json`: what a version is."""

    format_version: Literal[1, 2] = 2
    model: str
    version: int = Field(ge=1)
    created: str  # ISO 8601, UTC
    dataset: str
    labels: tuple[str, ...] = Field(min_length=2)
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    files: dict[str, FileEntry]
    network: str
    parameters: int
    training: dict[str, Any]  # the resolved training configuration, its seed included
    source_revision: str | None  # of the code that exported it; None outside a git checkout
    test_accuracy: Accuracy
    libraries: dict[str, str]

    @field_validator("files")
    @classmethod
    def _plain_names(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for name in files:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a plain file name")
        return files

    def artefacts(self) -> dict[str, tuple[str, Precision]]:
        """The backend and precision of each file that can be served."""
        return {
            name: (entry.backend, entry.precision)
            for name, entry in self.files.items()
            if entry.backend and entry.backend != "eager" and entry.precision
        }

    def file_for(self, backend: str, precision: str = "fp32") -> str:
        """The name of the file that `backend` runs at `precision`.

        Raises:
            BundleError: the version has no such file; the text names those that it has.
        """
        for name, entry in self.files.items():
            if entry.backend == backend and entry.precision == precision:
                return name
        have = ", ".join(f"{entry.backend} {entry.precision}" for entry in self.files.values() if entry.backend)
        raise BundleError(
            f"{self.model} version {self.version} has no {backend} {precision} file, only: {have}; "
            "export one with python -m trainer export --formats ... --precisions ..."
        )


@dataclass(frozen=True)
class Bundle:
    """One version, as its manifest describes it; `read` gives a file's verified bytes."""

    path: Path
    manifest: Manifest

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked against the manifest: what was verified is what is used.

        Raises:
            BundleError: the file is missing, not listed, or its sha256 is another than the manifest's.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path / MANIFEST}: lists no file {name}")
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise BundleError(f"{self.path / name}: {error.strerror}; export the model again") from error
        found = sha256(data)
        if found != entry.sha256:
            raise BundleError(
                f"{self.path / name}: sha256 is {found} ({len(data)} bytes), the manifest says {entry.sha256} "
                f"({entry.size_bytes} bytes); the file was changed or damaged: export the model again"
            )
        return data

    def verify(self) -> None:
        """Check every file against the manifest, and the manifest's labels, which no hash covers, against their file.

        Raises:
            BundleError: as `read`; or the labels differ.
        """
        for name in self.manifest.files:
            self.read(name)
        labels = tuple(self.read(LABELS).decode(errors="replace").splitlines())
        if labels != self.manifest.labels:
            raise BundleError(
                f"{self.path / MANIFEST}: its labels are not those of {LABELS}, {', '.join(labels)}; "
                "export the model again"
            )

    def golden(self, answers: str = "logits") -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """The golden images, uint8 [G,1,28,28], and logits for them, float32 [G,10].

        Args:
            answers: whose logits: the reference's, or those of the int8 file of this name.

        Raises:
            BundleError: the file is damaged, has no such answers, or does not fit the signature.
        """
        spec = self.manifest.inputs[0]
        try:
            with np.load(io.BytesIO(self.read(GOLDEN)), allow_pickle=False) as arrays:
                image, logits = arrays["image"], arrays[answers]
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise BundleError(f"{self.path / GOLDEN}: not a golden file ({error}); export the model again") from error
        if not (
            image.dtype == spec.dtype
            and spec.accepts(image.shape)
            and logits.dtype == np.float32
            and logits.shape == (len(image), len(self.manifest.labels))
            and np.isfinite(logits).all()
        ):
            raise BundleError(
                f"{self.path / GOLDEN}: image {image.dtype} {list(image.shape)} and logits {logits.dtype} "
                f"{list(logits.shape)} do not fit {spec.datatype} {spec.shape_text()} "
                f"and {len(self.manifest.labels)} classes"
            )
        return image, logits


def sha256(data: bytes) -> str:
    """The sha256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def open_bundle(path: Path) -> Bundle:
    """Read a version's manifest; its files are verified as they are read.

    Raises:
        BundleError: there is no manifest, it is not one, or it belongs to another model or version than its folder.
    """
    source = path / MANIFEST
    try:
        document = source.read_bytes()
        manifest = Manifest.model_validate_json(document)
    except OSError as error:
        raise BundleError(f"{source}: {error.strerror}; a version without its manifest is not complete") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        if problem["loc"] == ("format_version",):
            raise BundleError(
                f"{source}: format_version is {problem['input']}, this parityserve reads {problem['ctx']['expected']}; "
                "update parityserve, or export the model again with this one"
            ) from error
        raise BundleError(f"{source}: {where + ': ' if where else ''}{problem['msg']}") from error
    if manifest.format_version > 1:
        _check_unedited(source, document)
    # Where links lie and where they lead to: the version's, and the model's.
    paths = (path.absolute(), path.parent.resolve() / path.name, path.resolve())
    places = [(place.parent.name, place.name) for place in paths]
    if (manifest.model, str(manifest.version)) not in places:
        raise BundleError(
            f"{source}: describes {manifest.model} version {manifest.version}, but lies in {'/'.join(places[-1])}"
        )
    return Bundle(path, manifest)


def _check_unedited(manifest: Path, document: bytes) -> None:
    """Compare a manifest with the sha256 beside it: what no one can prove again must at least be what was written."""
    source = manifest.with_name(MANIFEST_SHA256)
    try:
        written = source.read_text(encoding="ascii", errors="replace").split()
    except OSError as error:
        raise BundleError(f"{source}: {error.strerror}; export the model again") from error
    if written != [(found := sha256(document)), MANIFEST]:
        raise BundleError(
            f"{manifest}: sha256 is {found}, {MANIFEST_SHA256} says {' '.join(written)[:100]}; "
            "the manifest was edited or damaged: restore it, or export the model again"
        )


def models(repository: Path) -> list[str]:
    """The names of the models in a repository: its folders that hold at least one version.

    Raises:
        BundleError: there is no such repository.
    """
    try:
        entries = sorted(repository.iterdir())
    except OSError as error:
        raise BundleError(f"{repository}: {error.strerror}; make train fills exported/") from error
    return [entry.name for entry in entries if MODEL_NAME.fullmatch(entry.name) and entry.is_dir() and versions(entry)]


def versions(model: Path) -> list[int]:
    """The version numbers in a model's folder, oldest first; drafts and other files are not versions."""
    if not model.is_dir():
        return []
    return sorted(int(entry.name) for entry in model.iterdir() if VERSION.fullmatch(entry.name) and entry.is_dir())


def check_repository(path: Path) -> None:
    """Refuse a model's folder where a repository's is wanted.

    Raises:
        BundleError: it has complete versions itself.
    """
    if any((path / str(number) / MANIFEST).exists() for number in versions(path)):
        repository = path.parent if path.name not in ("", "..") else path.resolve().parent
        raise BundleError(f"{path} is a model, not a repository: give --repository {repository}")


def newest(path: Path) -> Path:
    """The folder of a version: `path` itself when it is one, else the newest version of the model that it is.

    Raises:
        BundleError: there is neither.
    """
    if (path / MANIFEST).exists():
        return path
    numbers = versions(path)
    if not numbers:
        if VERSION.fullmatch(path.name) and not path.exists() and (others := versions(path.parent)):
            raise BundleError(f"{path.parent} has no version {path.name}; it has {', '.join(map(str, others))}")
        raise BundleError(f"{path}: neither a version nor a model with versions; make train exports one")
    return path / str(numbers[-1])


@contextlib.contextmanager
def draft(repository: Path, model: str) -> Iterator[Path]:
    """A folder beside a model's versions to write the next one in; removed on leaving unless it was published.

    Raises:
        ValueError: the model's name could not be a folder's.
    """
    if not MODEL_NAME.fullmatch(model):
        raise ValueError(f"model name: got {model!r}, want letters, digits, '.', '_', '-', the first a letter or digit")
    folder = repository / model / f".draft-{secrets.token_hex(4)}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, manifest: Manifest, card: Callable[[Manifest], str] | None = None) -> Bundle:
    """Give a finished draft its number, the next free one whatever `manifest.version` says, its card and its manifest.

    Args:
        folder: what `draft` gave, with every other file in it.
        manifest: with their entries.
        card: the text of the model card, of the manifest with the number.
    """
    files = manifest.files
    while True:
        number = max(versions(folder.parent), default=0) + 1
        manifest = manifest.model_copy(update={"version": number})
        if card:
            (folder / CARD).write_text(card(manifest), encoding="utf-8", newline="\n")
            manifest = manifest.model_copy(update={"files": {**files, CARD: entry(folder / CARD)}})
        document = json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(document, encoding="utf-8", newline="\n")
        (folder / MANIFEST_SHA256).write_text(f"{entry(folder / MANIFEST).sha256}  {MANIFEST}\n", newline="\n")
        final = folder.parent / str(number)
        try:
            folder.rename(final)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another export took this number meanwhile
                continue
            raise
        return Bundle(final, manifest)


def entry(path: Path, **fields: Any) -> FileEntry:
    """The manifest's entry for a file as it is on disk now."""
    data = path.read_bytes()
    return FileEntry(sha256=sha256(data), size_bytes=len(data), **fields)
