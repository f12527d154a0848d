"""Which versions are served: load, verify, warm, check against the golden answers, and only then READY."""

from __future__ import annotations

import contextlib
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
from serving.scheduler import Limits, Scheduler
from serving.statistics import Statistics

logger = logging.getLogger(__name__)

GOLDEN_RUNS = 3
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
        self._wanted: set[str] = set()  # from the start on; a client's failed load does not make the server unready
        self._retired = False
        self._loading = threading.Lock()  # held to change what is served; ONNX Runtime's sessions need it too

    def scan(self) -> None:
        """Find the newest version of every model asked for, and note it as LOADING.

        With `model_control` explicit only the models named are asked for; they, and the repository's, may be none.

        Raises:
            BundleError: there is no repository, it has no model, or not one that was asked for.
        """
        root = self._config.repository
        found = bundles.models(root)
        missing = sorted(set(self._config.models) - set(found))
        explicit = self._config.model_control == "explicit"
        if missing or not (found or explicit):
            what = f"no model {', '.join(missing)}" if missing else "no model"
            have = f"; it has {', '.join(found)}" if found else "; make train puts one into exported/"
            raise BundleError(f"{root}: {what}{have}")
        self._wanted = set(self._config.models or (() if explicit else found))
        for name in sorted(self._wanted):
            self._statuses[name] = Status(name, str(bundles.versions(root / name)[-1]), State.LOADING)

    def load_all(self) -> None:
        """Load every model found by `scan`; one that may not be served becomes UNAVAILABLE with the reason.

        Raises:
            DeviceError: the device asked for cannot be used.
        """
        for name in sorted(self._wanted):
            with self._loading, contextlib.suppress(BundleError):  # the status has the reason
                if self._statuses[name].state is State.LOADING:  # no client was quicker
                    self._replace(name, self._statuses[name].version)

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
                self._replace(name, str(numbers[-1]))
            except (BundleError, DeviceError) as error:
                raise InvalidArgument(f"failed to load '{name}', {error}") from error

    def unload(self, name: str) -> None:
        """Take a model out of service once the requests that wait for it are answered.

        Raises:
            NotFound: the model was never loaded.
        """
        with self._loading:
            status = self._statuses.get(name)
            if status is None:
                raise NotFound(f"failed to unload '{name}', the model is not known")
            self._statuses[name] = Status(name, status.version, State.UNAVAILABLE, UNLOADED)
            if status.served:
                status.served.scheduler.close()

    def _replace(self, name: str, version: str) -> None:
        """Load a version and serve it in place of what was served, which is then unloaded; `_loading` is held."""
        before = self._statuses.get(name)
        if before is None or before.served is None:
            self._statuses[name] = Status(name, version, State.LOADING)
        try:
            served = self._load(name, version)
        except (BundleError, DeviceError) as error:
            if before is None or before.served is None:
                self._statuses[name] = Status(name, version, State.UNAVAILABLE, str(error))
            raise
        self._statuses[name] = Status(name, version, State.READY, served=served)
        if before and before.served:
            before.served.scheduler.close()

    def _load(self, name: str, version: str) -> ServedModel:
        start = time.perf_counter()
        try:
            served = self._open(name, version)
        except DeviceError:
            raise
        except BundleError as error:
            logger.error("model %s version %s is not served: %s", name, version, error)
            raise
        except Exception as error:  # a file that is what it should be by its hash, and does what nobody foresaw
            logger.exception("model %s version %s is not served", name, version)
            raise BundleError(f"{name} version {version} cannot be run: {type(error).__name__}: {error}") from error
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
        scheduler = Scheduler(
            name,
            backend.run,
            statistics,
            Limits(max_batch_size, config.max_queue, config.max_queue_bytes, config.max_queue_delay_us),
            config.instances,
        )
        return ServedModel(name, version, backend, scheduler, statistics, max_batch_size, manifest, golden)

    def statuses(self) -> list[Status]:
        """Every version known, by model name."""
        return [self._statuses[name] for name in sorted(self._statuses)]

    def index(self) -> list[Status]:
        """Every model in the repository, those that were never loaded too, by name."""
        known = {name: Status(name, "", State.UNAVAILABLE) for name in bundles.models(self._config.repository)}
        return [status for _, status in sorted({**known, **self._statuses}.items())]

    def retire(self) -> None:
        """Report not being ready from now on, and go on answering."""
        self._retired = True

    def ready(self) -> bool:
        """Whether every version that should be served is READY."""
        if self._retired:
            return False
        wanted = [self._statuses[name] for name in self._wanted]
        return all(status.state is State.READY or status.reason == UNLOADED for status in wanted)

    def only_model(self) -> str:
        """The name of the only model.

        Raises:
            InvalidArgument: there are several, or none.
        """
        names = sorted(name for name, status in self._statuses.items() if status.reason != UNLOADED)
        if len(names) == 1:
            return names[0]
        raise InvalidArgument(f"model: got none, want one of: {', '.join(names)}")

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
    if not (len(version) < 20 and version.isascii() and version.isdigit() and int(version) > 0):
        raise InvalidArgument(
            f"failed to get model version from specified version string '{version[:100]}', "
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

    Batches of one, of three and of all images are run, which also warms the backend. Each runs several times and the
    last is judged: TorchScript optimises during the second run of a shape, and what it then runs is what will serve.

    Raises:
        GoldenMismatch: an answer is not the trained model's; the text has every failure.
        BundleError: the golden file is damaged.
    """
    image, logits = bundle.golden()
    precision = bundle.manifest.files[bundle.manifest.file_for(backend.name)].precision
    allowed = tolerance(precision or "fp32", backend.device)
    for size in (1, 3, len(image)):
        for _ in range(GOLDEN_RUNS):
            outputs = backend.run({bundle.manifest.inputs[0].name: image[:size]})
        comparison = compare_outputs(logits[:size], outputs, allowed)
        if not comparison.passed:
            raise GoldenMismatch(
                f"{bundle.path}: the answers on {backend.device} ({backend.provider}) are not the trained model's, "
                f"in a batch of {size}: {'; '.join(comparison.failures)}; export the model again"
            )
    return comparison
