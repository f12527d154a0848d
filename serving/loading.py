"""What a version goes through before it serves: open, verify, answer the golden images, warm up."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from serving import bundle as bundles
from serving.backends import Backend, open_backend, open_unverified
from serving.backends.engine import bucket_sizes
from serving.bundle import Bundle, Manifest
from serving.config import ServerConfig
from serving.errors import BundleError, DeviceError, GoldenMismatch
from serving.parity import Comparison, compare_outputs, tolerance
from serving.request_queue import Tell
from serving.scheduler import Limits, Scheduler
from serving.statistics import Statistics
from serving.versions import check_inside

logger = logging.getLogger(__name__)

RUNS = 3  # of each batch size: TorchScript optimises during the second, and what it then runs is what will serve


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
    buckets: tuple[int, ...]  # numbers of rows that the device is warmed for, ascending; none where any will do

    @property
    def verified(self) -> bool:
        """Whether its golden answers are the trained model's."""
        return self.golden is not None and self.golden.passed

    @property
    def doubt(self) -> str:
        """Why it is served although its answers are not the trained model's; empty where they are, or nobody knows."""
        return _mismatch(self.backend, self.golden) if self.golden and not self.golden.passed else ""


def load(config: ServerConfig, name: str, version: str, tell: Tell) -> ServedModel:
    """Make a version of the repository ready to serve; what came of it is logged.

    Raises:
        BundleError: it may not be served; the text has the reason.
        DeviceError: the device asked for cannot be used. Not logged.
    """
    start = time.perf_counter()
    try:
        served = _open(config, name, version, tell)
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
        *(name, version, backend.file, backend.provider, backend.device),
        f"golden answers within {served.golden.max_abs:.1e}" if served.golden and served.verified else "UNVERIFIED",
        1000 * (time.perf_counter() - start),
    )
    return served


def _open(config: ServerConfig, name: str, version: str, tell: Tell) -> ServedModel:
    folder = config.repository / name / version
    check_inside(config.repository, folder)
    manifest, golden = None, None
    if config.allow_unverified and _is_plain(folder):
        backend = open_unverified(folder / bundles.ONNX, config.device, config.engine)
    else:
        bundle = bundles.open_bundle(folder)
        bundle.verify()
        backend = open_backend(config.backend, bundle, config.device, config.engine, config.precision)
        manifest, golden = bundle.manifest, golden_check(bundle, backend)
        if not golden.passed:
            mismatch = f"{bundle.path}: {_mismatch(backend, golden)}"
            if config.golden == "strict":
                raise GoldenMismatch(mismatch)
            logger.warning("model %s version %s is served all the same, by --golden warn: %s", name, version, mismatch)
    max_batch_size = config.max_batch_size if _has_batch_axis(backend) else 0
    buckets = warm(backend, max_batch_size)
    statistics = Statistics()
    limits = Limits(
        min(max_batch_size, config.preferred_batch_size),
        config.max_queue,
        config.max_queue_bytes,
        config.max_queue_delay_us,
        buckets=buckets,
    )
    # A GPU's buffers belong to the threads that run it; and who allows a delay wants batches.
    there = backend.device == "cpu" and not config.max_queue_delay_us
    scheduler = Scheduler(name, backend.run, statistics, limits, config.instances, tell, there)
    return ServedModel(name, version, backend, scheduler, statistics, max_batch_size, manifest, golden, buckets)


def _is_plain(folder: Path) -> bool:
    """Whether a version is only an ONNX file, as Triton and OpenVINO Model Server lay it out, and no bundle."""
    return not (folder / bundles.MANIFEST).exists() and (folder / bundles.ONNX).is_file()


def _has_batch_axis(backend: Backend) -> bool:
    """Whether the first axis of every input and output may have any length: it is then the batch."""
    specs = (*backend.inputs, *backend.outputs)
    return all(spec.shape and isinstance(spec.shape[0], str) for spec in specs)


def golden_check(bundle: Bundle, backend: Backend) -> Comparison:
    """Answer the bundle's golden images on the very backend and device that will serve, and compare.

    Batches of one, of three and of all images are run, each several times, and the last run is judged. An int8 file on
    the CPU has to answer as it did itself when it was proved over the whole test set: beside the reference so few
    images would say little about it, and integers leave no room for rounding.

    Returns:
        The comparison of all images, with the largest difference and the failures of every batch.

    Raises:
        BundleError: the golden file is damaged.
    """
    _, precision = bundle.manifest.artefacts()[backend.file]
    if precision == "int8" and backend.device == "cpu":
        image, logits = bundle.golden(backend.file)
        allowed = tolerance("fp32", "cpu")
    else:
        image, logits = bundle.golden()
        allowed = tolerance(precision, backend.device, bundle.manifest.dataset, backend.tf32)
    failures, max_abs = [], 0.0
    for size in (1, 3, len(image)):
        for _ in range(RUNS):
            outputs = backend.run({bundle.manifest.inputs[0].name: image[:size]})
        comparison = compare_outputs(logits[:size], outputs, allowed)
        failures += [f"in a batch of {size}: {failure}" for failure in comparison.failures]
        max_abs = max(max_abs, comparison.max_abs)
    return replace(comparison, max_abs=max_abs, failures=tuple(failures))


def _mismatch(backend: Backend, golden: Comparison) -> str:
    """What is wrong with golden answers, and what to do."""
    return (
        f"the answers on {backend.device} ({backend.provider}) are not the trained model's, {backend.file} "
        f"{'; '.join(golden.failures)}; export the model again"
    )


def warm(backend: Backend, max_batch_size: int) -> tuple[int, ...]:
    """Run the batch sizes that batches are padded to, so that none is new to the device when it serves.

    Args:
        backend: what will serve. On the CPU a new batch size costs nothing.
        max_batch_size: the largest batch; 0 for a model without a batch axis.

    Returns:
        What `bucket_sizes` gives. None on the CPU, and where rows of zeros cannot be made: the model has no batch axis,
        takes texts, has other axes of any length, or fails.
    """
    specs = backend.inputs
    axes = [axis for spec in specs for axis in spec.shape[1:]]
    if backend.device == "cpu" or not max_batch_size or any(isinstance(axis, str) for axis in axes):
        return ()
    if any(spec.datatype == "BYTES" for spec in specs):
        return ()
    sizes = bucket_sizes(max_batch_size)
    try:
        for size in sizes:
            rows = {spec.name: np.zeros((size, *_numbers(spec.shape[1:])), spec.dtype) for spec in specs}
            for _ in range(RUNS):
                backend.run(rows)
    except Exception as error:
        logger.warning("batches are not padded to warmed sizes: the model cannot run %d rows of zeros: %s", size, error)
        return ()
    return sizes


def _numbers(axes: tuple[int | str, ...]) -> list[int]:
    return [axis for axis in axes if isinstance(axis, int)]
