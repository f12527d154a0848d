"""What is served and what is not: every version as it stands, and which of them answers a request.

Requests are answered on the event loop, which reads without a lock while other threads change what is served: a model's
entry is replaced as a whole.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable
from dataclasses import dataclass

from serving.errors import NotFound, QueueFull, Unavailable
from serving.loading import ServedModel
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
    reason: str = ""  # why it is UNAVAILABLE; of a READY one, why its changed files were not loaded
    served: ServedModel | None = None  # of a READY one

    @property
    def number(self) -> int:
        """The version as a number; 0 where there is none."""
        return int(self.version or 0)


class Model:
    """A model's versions as they stand; never changed."""

    def __init__(self, statuses: Iterable[Status]) -> None:
        self.statuses = {status.version: status for status in sorted(statuses, key=lambda s: s.number)}
        self.served = [status.served for status in self.statuses.values() if status.served]  # oldest first
        self.numbers = {int(served.version) for served in self.served}
        self.by_version = {served.version: served for served in self.served}
        if self.served:
            self.by_version[""] = self.served[-1]  # what a request without a version gets
        self.unloaded = all(status.reason == UNLOADED for status in self.statuses.values())


class Catalog:
    """The versions that are known, by model; `Repository` fills it."""

    def __init__(self) -> None:
        self._models: dict[str, Model] = {}

    def statuses(self) -> list[Status]:
        """Every version known, by model name and then by number."""
        return [status for _, model in sorted(self._models.copy().items()) for status in model.statuses.values()]

    def check_room(self) -> None:
        """Whether a request may find room, where that can be told before it is read: a single version is served.

        Raises:
            QueueFull: it may not, and is counted as refused.
        """
        served = [served for model in tuple(self._models.values()) for served in model.served]
        if len(served) == 1:
            start_ns = time.monotonic_ns()
            try:
                served[0].scheduler.queue.check()
            except QueueFull:
                served[0].statistics.failed(start_ns)
                raise

    def answering(self) -> dict[str, bool]:
        """Whether a version is READY, of every model known."""
        return {name: bool(model.served) for name, model in self._models.copy().items()}

    def get(self, name: str, version: str = "") -> ServedModel:
        """The version to answer with; an empty one means the newest that is READY. The texts begin with Triton's.

        Raises:
            InvalidArgument: the version is not a number.
            NotFound: no such model or version.
            Unavailable: it is loading or may not be served; the text has the reason.
        """
        model = self._models.get(name)
        if model and (served := model.by_version.get(version)):
            return served
        number = version_number(version)
        if model is None:
            names = ", ".join(sorted(self._models.copy()))
            raise NotFound(f"Request for unknown model: '{name}' is not found; this server has: {names}")
        if model.unloaded:
            raise NotFound(f"Request for unknown model: '{name}' has no available versions")
        status = model.statuses.get(number or list(model.statuses)[-1])
        if status is None:
            have = [served.version for served in model.served] or model.statuses
            raise NotFound(
                f"Request for unknown model: '{name}' version {number} is not found; "
                f"this server has: {name} version {', '.join(have)}"
            )
        if status.served is None:
            doing = "being unloaded" if status.state is State.UNLOADING else "loading"
            raise Unavailable(
                f"Request for unknown model: '{name}' version {status.version} is not at ready state; "
                f"{status.reason or f'it is {doing}'}"
            )
        return status.served

    def versions(self, name: str, version: str = "") -> list[ServedModel]:
        """The versions of a model that are READY, oldest first, or only the one named; raises what `get` raises."""
        served = self.get(name, version)
        return [served] if version else self._model(name).served or [served]

    def _model(self, name: str) -> Model:
        return self._models.get(name) or Model(())
