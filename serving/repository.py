"""Which versions are served: load, verify, warm, check against the golden answers, and only then READY."""

from __future__ import annotations

import enum
import logging
import time
from dataclasses import dataclass

from serving import bundle as bundles
from serving.backends import Backend, open_backend
from serving.bundle import Bundle, Manifest
from serving.config import ServerConfig
from serving.errors import BundleError, GoldenMismatch, InvalidArgument, NotFound, Unavailable
from serving.parity import Comparison, compare_outputs, tolerance
from serving.scheduler import Scheduler

logger = logging.getLogger(__name__)


class State(enum.Enum):
    """Where a version stands."""

    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True)
class ServedModel:
    """A version that passed its golden check and answers requests."""

    manifest: Manifest
    backend: Backend
    scheduler: Scheduler
    golden: Comparison


@dataclass(frozen=True)
class Status:
    """What is known of one version, served or not."""

    name: str
    version: str
    state: State
    reason: str = ""
    served: ServedModel | None = None


class Repository:
    """The models that a server serves, from the folder `config.repository`."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._statuses: dict[str, Status] = {}

    def scan(self) -> None:
        """Find the newest version of every model asked for, and note it as LOADING.

        Raises:
            BundleError: there is no repository, it has no model, or not one that was asked for.
        """
        found = bundles.models(self._config.repository)
        missing = sorted(set(self._config.models) - set(found))
        if missing or not found:
            what = f"no model {', '.join(missing)}" if missing else "no model"
            have = f"; it has {', '.join(found)}" if found else "; make train puts one into exported/"
            raise BundleError(f"{self._config.repository}: {what}{have}")
        for name in self._config.models or found:
            version = bundles.versions(self._config.repository / name)[-1]
            self._statuses[name] = Status(name, str(version), State.LOADING)

    def load_all(self) -> None:
        """Load every model found by `scan`; one that may not be served becomes UNAVAILABLE with the reason.

        Raises:
            DeviceError: the device asked for cannot be used.
        """
        for name, status in self._statuses.items():
            self._statuses[name] = self._load(name, status.version)

    def _load(self, name: str, version: str) -> Status:
        start = time.perf_counter()
        try:
            served = self._open(bundles.open_bundle(self._config.repository / name / version))
        except BundleError as error:
            logger.error("model %s version %s is not served: %s", name, version, error)
            return Status(name, version, State.UNAVAILABLE, str(error))
        backend = served.backend
        logger.info(
            "model %s version %s READY: %s, %s on %s; golden answers within %.1e; %.0f ms",
            *(name, version, backend.name, backend.provider, backend.device, served.golden.max_abs),
            1000 * (time.perf_counter() - start),
        )
        return Status(name, version, State.READY, served=served)

    def _open(self, bundle: Bundle) -> ServedModel:
        bundle.verify()
        backend = open_backend(self._config.backend, bundle, self._config.device, self._config.threads)
        comparison = golden_check(bundle, backend)
        scheduler = Scheduler(bundle.manifest.model, backend.run, self._config.max_queue)
        return ServedModel(bundle.manifest, backend, scheduler, comparison)

    def statuses(self) -> list[Status]:
        """Every version known, by model name."""
        return [self._statuses[name] for name in sorted(self._statuses)]

    def ready(self) -> bool:
        """Whether every version known is READY."""
        return bool(self._statuses) and all(s.state is State.READY for s in self._statuses.values())

    def get(self, name: str, version: str = "") -> ServedModel:
        """The model to answer with; an empty name means the only one, an empty version the newest.

        Raises:
            InvalidArgument: no name was given and there are several models.
            NotFound: no such model or version.
            Unavailable: it is loading or may not be served; the text has the reason.
        """
        if not name and len(self._statuses) == 1:
            name = next(iter(self._statuses))
        status = self._statuses.get(name)
        if status is None:
            names = ", ".join(sorted(self._statuses))
            if not name:
                raise InvalidArgument(f"model: got none, want one of: {names}")
            raise NotFound(f"model {name!r} is not known; this server has: {names}")
        if version not in ("", status.version):
            raise NotFound(f"model {name} has no version {version!r} here; it serves version {status.version}")
        if status.served is None:
            what = "is loading" if status.state is State.LOADING else "is not served"
            raise Unavailable(
                f"model {name} version {status.version} {what}{': ' if status.reason else ''}{status.reason}"
            )
        return status.served

    def close(self) -> None:
        """Let running inferences end and refuse new ones."""
        for status in self._statuses.values():
            if status.served:
                status.served.scheduler.close()


def golden_check(bundle: Bundle, backend: Backend) -> Comparison:
    """Answer the bundle's golden images on the very backend and device that will serve, and compare.

    Batches of one, of three and of all images are run, which also warms the backend.

    Raises:
        GoldenMismatch: an answer is not the trained model's; the text has every failure.
        BundleError: the golden file is damaged.
    """
    image, logits = bundle.golden()
    precision = bundle.manifest.files[bundle.manifest.file_for(backend.name)].precision
    allowed = tolerance(precision or "fp32", backend.device)
    for size in (1, 3, len(image)):
        outputs = backend.run({bundle.manifest.inputs[0].name: image[:size]})
        comparison = compare_outputs(logits[:size], outputs, allowed)
        if not comparison.passed:
            raise GoldenMismatch(
                f"{bundle.path}: the answers on {backend.device} ({backend.provider}) are not the trained model's, "
                f"in a batch of {size}: {'; '.join(comparison.failures)}; export the model again"
            )
    return comparison
