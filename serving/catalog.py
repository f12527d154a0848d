"""What is served and what is not: every version as it stands, and which of them answers a request.

Who answers requests reads without a lock, on any thread, while others change what is served: a model's entry is
replaced as a whole.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from serving.errors import NotFound, QueueFull, Unavailable
from serving.loading import ServedModel
from serving.version_labels import STABLE, Labels
from serving.versions import version_number

UNLOADED = "unloaded"  # Triton's word for a model that was taken out of service


class State(enum.Enum):
    """Where a version stands."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"  # answers what waits for it, and takes nothing new
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True)
class Status:
    """What is known of one version, served or not."""

    name: str
    version: str  # empty where a model has no version that could be named
    state: State
    reason: str = ""  # why it is UNAVAILABLE; of a READY one, why it is not verified, or its changed files not loaded
    served: ServedModel | None = None  # of a READY one
    labels: tuple[str, ...] = ()  # which mean it, by name

    @property
    def number(self) -> int:
        """The version as a number; 0 where there is none."""
        return int(self.version or 0)


class Model:
    """A model's versions as they stand; never changed."""

    def __init__(self, statuses: Iterable[Status], labels: Labels) -> None:
        names: dict[int, list[str]] = {}
        for label, number in sorted(labels.in_force.items()):
            names.setdefault(number, []).append(label)
        self.labels = labels
        self.statuses = {
            status.version: replace(status, labels=tuple(names.get(status.number, ())))
            for status in sorted(statuses, key=lambda s: s.number)
        }
        self.served = [status.served for status in self.statuses.values() if status.served]  # oldest first
        self.numbers = {int(served.version) for served in self.served}
        self.by_version = {served.version: served for served in self.served}
        self.by_version |= {
            label: self.by_version[str(number)]
            for label, number in labels.in_force.items()
            if str(number) in self.by_version
        }
        if STABLE in self.by_version:  # what a request without a version gets
            self.by_version[""] = self.by_version[STABLE]
        elif self.served and STABLE not in labels.in_force:
            self.by_version[""] = self.served[-1]
        self.unloaded = all(status.reason == UNLOADED for status in self.statuses.values())


class Catalog:
    """The versions that are known, by model; `Repository` fills it."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}
        self._labels: dict[str, Labels] = {}
        self.only: ServedModel | None = None  # the version that is served, where there is but one

    def statuses(self) -> list[Status]:
        """Every version known, by model name and then by number."""
        return [status for _, model in sorted(self._models.copy().items()) for status in model.statuses.values()]

    def check_room(self) -> None:
        """Whether a request may find room, where that can be told before it is read: a single version is served.

        Raises:
            QueueFull: it may not, and is counted as refused.
        """
        if served := self.only:
            start_ns = time.monotonic_ns()
            try:
                served.scheduler.check_room()
            except QueueFull:
                served.statistics.failed(start_ns)
                raise

    def _changed(self) -> None:
        served = [served for model in self._models.values() for served in model.served]
        self.only = served[0] if len(served) == 1 else None

    def answering(self) -> dict[str, bool]:
        """Whether a version is READY, of every model known."""
        return {name: bool(model.served) for name, model in self._models.copy().items()}

    def get(self, name: str, version: str = "") -> ServedModel:
        """The version to answer with. The texts begin with Triton's.

        Args:
            name: the model.
            version: a number or a label. None means `stable`, or where there is no such label, the newest READY one.

        Raises:
            InvalidArgument: the version is neither a number nor one of the model's labels.
            NotFound: no such model or version.
            Unavailable: it is loading or may not be served; the text has the reason.
        """
        model = self._models.get(name)
        if model and (served := model.by_version.get(version)):
            return served
        labels = {**model.labels.wanted, **model.labels.in_force} if model else {}
        label = version or STABLE
        number = str(labels[label]) if label in labels else version_number(version, labels)
        if model is None:
            names = sorted(name for name, model in self._models.copy().items() if not model.unloaded)
            loaded = f"this server has: {', '.join(names)}" if names else "no model is loaded"
            raise NotFound(f"Request for unknown model: '{name}' is not found; {loaded}")
        if model.unloaded:
            raise NotFound(f"Request for unknown model: '{name}' has no available versions")
        meant = f", which the label {label} means," if label in labels else ""
        status = model.statuses.get(number or list(model.statuses)[-1])
        if status is None:
            have = [served.version for served in model.served] or model.statuses
            raise NotFound(
                f"Request for unknown model: '{name}' version {number}{meant} is not found; "
                f"this server has: {name} version {', '.join(have)}"
            )
        if status.served is None:
            doing = "being unloaded" if status.state is State.UNLOADING else "loading"
            raise Unavailable(
                f"Request for unknown model: '{name}' version {status.version}{meant} is not at ready state; "
                f"{status.reason or f'it is {doing}'}"
            )
        return status.served

    def labels(self) -> dict[str, Labels]:
        """The labels of models, by name."""
        return self._labels.copy()

    def versions(self, name: str, version: str = "") -> list[ServedModel]:
        """The versions of a model that are READY, oldest first, or only the one named; raises what `get` raises."""
        served = [] if version else self._model(name).served
        return served or [self.get(name, version)]

    def _put(self, name: str, statuses: Iterable[Status]) -> None:
        self._models[name] = Model(statuses, self._labels.get(name) or Labels())
        self._changed()

    def _drop(self, name: str) -> None:
        self._models.pop(name, None)
        self._changed()

    def _model(self, name: str) -> Model:
        return self._models.get(name) or Model((), Labels())
