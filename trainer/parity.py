"""Prove that a bundle's files answer like the PyTorch model: every file, on a device, over the test set and extremes.

The reference is the network rebuilt from the bundle's `weights.pt`: eager PyTorch, fp32, on the CPU. The tolerances
stand in `serving/parity.py`, which the server's load gate uses too.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from serving.backends import Backend, open_backend
from serving.backends.engine import Engine
from serving.bundle import GOLDEN, MANIFEST, Bundle
from serving.errors import BundleError
from serving.parity import Comparison, compare, compare_outputs, tolerance
from trainer.config import HEIGHT, WIDTH, NetworkConfig
from trainer.data import Split
from trainer.models import Network
from trainer.train import EVALUATION_BATCH, predict

NOISE_IMAGES = 16
NOISE_SEED = 0
ACCURACY_IMAGES = 2  # a tie may fall otherwise on the device that measured the accuracy


@dataclass(frozen=True)
class Row:
    """One line of the parity table: a file on a device, with one batch size."""

    file: str
    backend: str
    provider: str
    device: str
    batch_size: int
    comparison: Comparison


@dataclass(frozen=True)
class Report:
    """The parity table of one version."""

    model: str
    version: int
    images: int
    reference_accuracy: float
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.comparison.passed for row in self.rows)

    def document(self) -> dict[str, Any]:
        """The report as JSON takes it."""
        rows = [{**asdict(row), "passed": row.comparison.passed} for row in self.rows]
        return {**asdict(self), "rows": rows, "passed": self.passed}


def extremes() -> npt.NDArray[np.uint8]:
    """Images at the edges of what can come in, uint8 [18, 1, 28, 28]: all 0, all 255, and noise."""
    noise = np.random.default_rng(NOISE_SEED).integers(0, 256, (NOISE_IMAGES, 1, HEIGHT, WIDTH), dtype=np.uint8)
    flat = np.stack([np.full((1, HEIGHT, WIDTH), value, np.uint8) for value in (0, 255)])
    return np.concatenate([flat, noise])


def batch_sizes(largest: int) -> tuple[int, ...]:
    """One, three, one between, and the largest."""
    return tuple(sorted({1, 3, max(1, largest // 7), largest}))


def reference(bundle: Bundle) -> Network:
    """The PyTorch network of a bundle, on the CPU.

    Raises:
        BundleError: its weights are damaged or of an unknown network.
    """
    data = bundle.read(bundle.manifest.file_for("eager"))
    manifest = bundle.manifest
    form = {name: value for name, value in manifest.training.items() if name in NetworkConfig.model_fields}
    try:
        config = NetworkConfig(**form)  # versions from before networks had options are of the default, `cnn`
    except ValidationError as error:
        raise BundleError(f"{bundle.path}: its network is not one of this version's: {error}") from error
    if config.name != manifest.network:
        raise BundleError(f"{bundle.path}: network {manifest.network!r} is not known here")
    network = Network(config)
    try:
        network.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BundleError(f"{bundle.path}: not the weights of network {manifest.network}: {error}") from error
    return network.eval()


def check(
    bundle: Bundle,
    test: Split,
    device: str = "auto",
    largest_batch: int = 1000,
    on_images: Callable[[int], None] = lambda _: None,
) -> Report:
    """Compare every file of a bundle with the reference.

    Args:
        bundle: a version; its files are verified as they are opened.
        test: the test set, on the CPU.
        device: where the files run: `auto`, `cpu`, `cuda` or `cuda:N`.
        largest_batch: the largest batch size to try.
        on_images: called with the number of images after every batch.

    Raises:
        BundleError: a file is missing or damaged.
        DeviceError: the device cannot be used.
    """
    network = reference(bundle)
    images = np.concatenate([test.images.numpy(), extremes()])
    labels = test.labels.numpy()
    want = predict(network, torch.from_numpy(images)).numpy()
    rows = [_golden_row(bundle, network), _accuracy_row(bundle, want[: len(labels)], labels)]
    for file, (name, precision) in bundle.manifest.artefacts().items():
        backend = open_backend(name, bundle, device, Engine(torch.get_num_threads()), precision)
        allowed = tolerance(precision, backend.device, bundle.manifest.dataset)
        for size in batch_sizes(largest_batch):
            got = _answers(backend, images, size, on_images)
            comparison = compare_outputs(want, got, allowed, labels)
            rows.append(Row(file, backend.name, backend.provider, backend.device, size, comparison))
    return Report(
        model=bundle.manifest.model,
        version=bundle.manifest.version,
        images=len(images),
        reference_accuracy=float((want[: len(labels)].argmax(1) == labels).mean()),
        rows=tuple(rows),
    )


def _golden_row(bundle: Bundle, network: Network) -> Row:
    """Whether the golden answers are still those of the weights beside them."""
    image, logits = bundle.golden()
    again = predict(network, torch.from_numpy(image)).numpy()
    comparison = compare(again, logits, tolerance("fp32", "cpu"))
    return Row(GOLDEN, "eager", "torch", "cpu", len(image), comparison)


def _accuracy_row(bundle: Bundle, logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> Row:
    """Whether the accuracy that the manifest claims, if of as many images, is that of the weights beside it."""
    claimed = bundle.manifest.test_accuracy
    measured = float((logits.argmax(1) == labels).mean())
    failures = []
    if claimed.n == len(labels) and abs(measured - claimed.value) * claimed.n > ACCURACY_IMAGES + 0.5:
        failures.append(f"the manifest claims an accuracy of {claimed.value:.4%}, its weights have {measured:.4%}")
    comparison = Comparison(len(labels), 0.0, 0.0, 1.0, measured, 0, tuple(failures))
    return Row(MANIFEST, "eager", "torch", "cpu", EVALUATION_BATCH, comparison)


def _answers(
    backend: Backend, images: npt.NDArray[np.uint8], batch_size: int, on_images: Callable[[int], None]
) -> Mapping[str, npt.NDArray[np.generic]]:
    """A backend's outputs for all images, run in batches of `batch_size`."""
    name = backend.inputs[0].name
    parts = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        parts.append(backend.run({name: batch}))
        on_images(len(batch))
    return {output.name: np.concatenate([part[output.name] for part in parts]) for output in backend.outputs}
