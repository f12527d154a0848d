"""Which versions are served: load, verify, warm, check against the golden answers, and only then READY."""

from __future__ import annotations

import enum
import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from serving import bundle as bundles
from serving.backends import Backend, open_backend, open_unverified
from serving.bundle import Bundle, Manifest
from serving.config import ServerConfig
from serving.errors import BundleError, DeviceError, GoldenMismatch, InvalidArgument, NotFound, Unavailable
from serving.parity import Comparison, compare_outputs, tolerance
from serving.scheduler import Scheduler
from serving.statistics import Statistics

logger = logging.getLogger(__name__)

UNLOADED = "unloaded"  # Triton's word for a model that was taken out of service


class State(enum.Enum):
    """Where a version stands."""

    LOADING = "LOADING"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True)
class ServedModel:
    """A version that answers requests."""

    name: str
    version: str
    backend: Backend
    scheduler: Scheduler
    statistics: Statistics
    max_batch_size: int  # 0 for a model whose first axis is no batch axis
    manifest: Manifest | None  # None, as `golden`, for a model that is served unverified
    golden: Comparison | None


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
        self._loading = threading.Lock()  # ONNX Runtime's sessions may not be created concurrently

    def scan(self) -> None:
        """Find the newest version of every model asked for, and note it as LOADING.

        With `model_control` explicit only the models named are asked for; they may be none.

        Raises:
            BundleError: there is no repository, it has no model, or not one that was asked for.
        """
        root = self._config.repository
        found = bundles.models(root)
        missing = sorted(set(self._config.models) - set(found))
        if missing or not found:
            what = f"no model {', '.join(missing)}" if missing else "no model"
            have = f"; it has {', '.join(found)}" if found else "; make train puts one into exported/"
            raise BundleError(f"{root}: {what}{have}")
        everything = () if self._config.model_control == "explicit" else found
        for name in self._config.models or everything:
            self._statuses[name] = Status(name, str(bundles.versions(root / name)[-1]), State.LOADING)

    def load_all(self) -> None:
        """Load every model found by `scan`; one that may not be served becomes UNAVAILABLE with the reason.

        Raises:
            DeviceError: the device asked for cannot be used.
        """
        for name, status in list(self._statuses.items()):
            try:
                served = self._load(name, status.version)
            except BundleError as error:
                self._statuses[name] = Status(name, status.version, State.UNAVAILABLE, str(error))
            else:
                self._statuses[name] = Status(name, status.version, State.READY, served=served)

    def load(self, name: str) -> None:
        """Load the newest version of a model, and serve it in place of the one served before, which is then unloaded.

        Raises:
            InvalidArgument: there is no such model, or it may not be served; what was served goes on being served.
        """
        if not bundles.MODEL_NAME.fullmatch(name):
            raise InvalidArgument(f"failed to load '{name}', model name must not contain path traversal characters")
        with self._loading:
            numbers = bundles.versions(self._config.repository / name)
            if not numbers:
                raise InvalidArgument(f"failed to load '{name}', failed to poll from model repository")
            try:
                served = self._load(name, str(numbers[-1]))
            except (BundleError, DeviceError) as error:
                status = self._statuses.get(name)
                if status is None or status.served is None:
                    self._statuses[name] = Status(name, str(numbers[-1]), State.UNAVAILABLE, str(error))
                raise InvalidArgument(f"failed to load '{name}', {error}") from error
            before = self._statuses.get(name)
            self._statuses[name] = Status(name, served.version, State.READY, served=served)
        if before and before.served:
            before.served.scheduler.close()

    def unload(self, name: str) -> None:
        """Take a model out of service once the requests that wait for it are answered.

        Raises:
            NotFound: the model was never loaded.
        """
        status = self._statuses.get(name)
        if status is None:
            raise NotFound(f"failed to unload '{name}', the model is not known")
        self._statuses[name] = Status(name, status.version, State.UNAVAILABLE, UNLOADED)
        if status.served:
            status.served.scheduler.close()

    def _load(self, name: str, version: str) -> ServedModel:
        start = time.perf_counter()
        try:
            served = self._open(name, version)
        except BundleError as error:
            logger.error("model %s version %s is not served: %s", name, version, error)
            raise
        backend = served.backend
        logger.info(
            "model %s version %s READY: %s, %s on %s; %s; %.0f ms",
            *(name, version, backend.name, backend.provider, backend.device),
            f"golden answers within {served.golden.max_abs:.1e}" if served.golden else "UNVERIFIED",
            1000 * (time.perf_counter() - start),
        )
        return served

    def _open(self, name: str, version: str) -> ServedModel:
        config = self._config
        folder = config.repository / name / version
        manifest, golden = None, None
        if config.allow_unverified and _is_plain(folder):
            backend = open_unverified(folder / bundles.ONNX, config.device, config.threads)
        else:
            bundle = bundles.open_bundle(folder)
            bundle.verify()
            backend = open_backend(config.backend, bundle, config.device, config.threads)
            manifest, golden = bundle.manifest, golden_check(bundle, backend)
        max_batch_size = config.max_batch_size if _has_batch_axis(backend) else 0
        statistics = Statistics()
        scheduler = Scheduler(name, backend.run, statistics, max_batch_size, config.max_queue)
        return ServedModel(name, version, backend, scheduler, statistics, max_batch_size, manifest, golden)

    def statuses(self) -> list[Status]:
        """Every version known, by model name."""
        return [self._statuses[name] for name in sorted(self._statuses)]

    def index(self) -> list[Status]:
        """Every model in the repository, those that were never loaded too, by name."""
        known = {name: Status(name, "", State.UNAVAILABLE) for name in bundles.models(self._config.repository)}
        return [status for _, status in sorted({**known, **self._statuses}.items())]

    def ready(self) -> bool:
        """Whether every version that should be served is READY."""
        return all(status.state is State.READY or status.reason == UNLOADED for status in self._statuses.values())

    def only_model(self) -> str:
        """The name of the only model.

        Raises:
            InvalidArgument: there are several, or none.
        """
        if len(self._statuses) == 1:
            return next(iter(self._statuses))
        raise InvalidArgument(f"model: got none, want one of: {', '.join(sorted(self._statuses))}")

    def get(self, name: str, version: str = "") -> ServedModel:
        """The model to answer with; an empty version means the newest. The texts are Triton's, up to the semicolon.

        Raises:
            InvalidArgument: the version is not a number.
            NotFound: no such model or version.
            Unavailable: it is loading or may not be served; the text has the reason.
        """
        number = _version_number(version)
        status = self._statuses.get(name)
        if status is None:
            names = ", ".join(sorted(self._statuses))
            raise NotFound(f"Request for unknown model: '{name}' is not found; this server has: {names}")
        if status.reason == UNLOADED:
            raise NotFound(f"Request for unknown model: '{name}' has no available versions")
        if number not in ("", status.version):
            raise NotFound(
                f"Request for unknown model: '{name}' version {number} is not found; "
                f"this server has: {name} version {status.version}"
            )
        if status.served is None:
            reason = status.reason or "it is loading"
            raise Unavailable(
                f"Request for unknown model: '{name}' version {status.version} is not at ready state; {reason}"
            )
        return status.served

    def close(self) -> None:
        """Answer the requests that wait and refuse new ones."""
        for status in self._statuses.values():
            if status.served:
                status.served.scheduler.close()


def _version_number(version: str) -> str:
    """A version as it is written in the repository: without leading zeros."""
    if not version:
        return ""
    if not (version.isascii() and version.isdigit() and int(version) > 0 and len(version) < 20):
        raise InvalidArgument(
            f"failed to get model version from specified version string '{version}', "
            "version should be an integral value > 0"
        )
    return str(int(version))


def _is_plain(folder: Path) -> bool:
    """Whether a version is only an ONNX file, as Triton and OpenVINO Model Server lay it out, and no bundle."""
    return not (folder / bundles.MANIFEST).exists() and (folder / bundles.ONNX).is_file()


def _has_batch_axis(backend: Backend) -> bool:
    """Whether the first axis of every input and output may have any length: it is then the batch."""
    specs = (*backend.inputs, *backend.outputs)
    return all(spec.shape and isinstance(spec.shape[0], str) for spec in specs)


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
