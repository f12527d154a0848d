"""Names for versions, such as `stable` and `canary`: kept beside a model's versions in `version_labels.json`.

    {"stable": 3, "canary": 4}

The file is the repository's, not a server's: whoever promotes a version changes it, and servers read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from serving import bundle as bundles
from serving.errors import BundleError

FILE = "version_labels.json"
STABLE = "stable"  # where a model has this one, it answers requests that name no version

LABEL = re.compile(r"[a-z][a-z0-9-]{0,31}")

_DOCUMENT = TypeAdapter(
    dict[Annotated[str, Field(pattern=f"^{LABEL.pattern}$")], Annotated[int, Field(strict=True, ge=1, lt=10**9)]]
)


@dataclass(frozen=True)
class Labels:
    """A model's labels: the number of a version by label.

    A label that is moved goes on meaning what it meant until the version that it shall mean is READY.
    """

    wanted: Mapping[str, int] = field(default_factory=dict)  # as the repository has them
    in_force: Mapping[str, int] = field(default_factory=dict)  # as requests are answered

    @property
    def numbers(self) -> set[int]:
        """Every version that one of them means or shall mean."""
        return {*self.wanted.values(), *self.in_force.values()}

    def enforced(self, served: Collection[int]) -> Labels:
        """With every change in force for which the version is READY, of those that are `served`."""
        moved = {label: number for label, number in self.wanted.items() if number in served}
        kept = {label: number for label, number in self.in_force.items() if label in self.wanted}
        return Labels(self.wanted, kept | moved)

    def troubles(self, served: Collection[int]) -> list[str]:
        """What is to be said of labels whose version is not among those that are `served`."""
        return [
            f"version {number}, which the label {label} shall mean, is not served"
            + (f"; it goes on meaning {former}" if (former := self.in_force.get(label)) in served else "")
            for label, number in sorted(self.wanted.items())
            if number not in served
        ]


def read(model: Path) -> dict[str, int]:
    """The labels of the model in a folder; none where it has no such file.

    Raises:
        BundleError: the file is damaged or cannot be read.
    """
    path = model / FILE
    try:
        document = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from error
    try:
        return _DOCUMENT.validate_json(document)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"] if part != "[key]")
        raise BundleError(
            f'{path}: {where + ": " if where else ""}{problem["msg"]}; want {{"label": version, ...}}, which '
            "python -m serving promote writes"
        ) from error


def promote(repository: Path, model: str, version: int, label: str) -> dict[str, int]:
    """Have a label mean a version, whose every file is checked before; returns the model's labels.

    Raises:
        ValueError: it could not be a label.
        BundleError: the version is not there, is damaged, or the labels that there are cannot be read.
    """
    if not LABEL.fullmatch(label):
        raise ValueError(f"--label: got {label!r}, want a to z, 0 to 9 and -, a letter first, at most 32")
    folder = _folder(repository, model)
    if version not in (have := bundles.versions(folder)):
        raise BundleError(f"{folder}: no version {version}; it has {', '.join(map(str, have))}")
    bundles.open_bundle(folder / str(version)).verify()
    labels = read(folder) | {label: version}
    _write(folder, labels)
    return labels


def remove(repository: Path, model: str, label: str) -> dict[str, int]:
    """Take a label away; returns those that are left.

    Raises:
        BundleError: there is no such label, or the labels that there are cannot be read.
    """
    folder = _folder(repository, model)
    labels = read(folder)
    if label not in labels:
        raise BundleError(f"{folder}: no label {label}; it has {', '.join(sorted(labels)) or 'none'}")
    del labels[label]
    _write(folder, labels)
    return labels


def of(repository: Path, model: str) -> dict[str, int]:
    """The labels of a model in a repository.

    Raises:
        BundleError: there is no such model, or its labels cannot be read.
    """
    return read(_folder(repository, model))


def _folder(repository: Path, model: str) -> Path:
    if model not in (have := bundles.models(repository)):
        raise BundleError(f"{repository}: no model {model}; it has {', '.join(have) or 'none'}")
    return repository / model


def _write(model: Path, labels: Mapping[str, int]) -> None:
    """Put the file in place by one rename: a server that reads it meanwhile finds the old one or the new one."""
    draft = model / f".draft-{secrets.token_hex(4)}"
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(dict(sorted(labels.items()))) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(model / FILE)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
