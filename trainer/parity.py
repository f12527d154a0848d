"""Prove that a bundle's files answer like the PyTorch model: every file, on every device, over test set and extremes.

The reference is the network rebuilt from the bundle's `weights.pt`: eager PyTorch, fp32, on the CPU. The tolerances
stand in `serving/parity.py`, which the server's load gate uses too.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from serving.backends import Backend, open_backend
from serving.backends.cuda import device_names
from serving.backends.engine import Engine
from serving.bundle import GOLDEN, LABELS, MANIFEST, Bundle
from serving.errors import BundleError, DeviceError, InvalidArgument
from serving.loading import golden_check
from serving.parity import Comparison, compare, compare_outputs, not_compared, tolerance
from serving.remote import RemoteBackend
from trainer.config import HEIGHT, WIDTH, NetworkConfig
from trainer.data import DATASETS, Split
from trainer.matrix import Report, Row, Worst, distribution
from trainer.models import Network
from trainer.train import EVALUATION_BATCH, predict

NOISE_IMAGES = 16
NOISE_SEED = 0
_EXTREMES = ("all 0", "all 255", *(f"noise {index}" for index in range(NOISE_IMAGES)))  # what `extremes` gives
ACCURACY_IMAGES = 2  # a tie may fall otherwise on the device that measured the accuracy
_CPU_ONLY = {"aoti"}  # compiled for a processor


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
    manifest = bundle.manifest
    file = manifest.file_for("eager")
    data = bundle.read(file)
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
    except (EOFError, pickle.UnpicklingError) as error:  # whose text advises to load it unsafely
        raise BundleError(f"{bundle.path / file} holds no weights; export the model again") from error
    except RuntimeError as error:
        raise BundleError(f"{bundle.path}: not the weights of network {manifest.network}: {error}") from error
    return network.eval()


@dataclass(frozen=True)
class _Wanted:
    """What every candidate is compared with."""

    images: npt.NDArray[np.uint8]  # [N, 1, 28, 28]: the test set, then the extremes
    labels: npt.NDArray[np.int64]  # of the test set
    logits: npt.NDArray[np.float32]  # of all images
    dataset: str

    def rows(
        self, backend: Backend, precision: str, sizes: tuple[int, ...], on_images: Callable[[int], None]
    ) -> Iterator[Row]:
        """A row for each batch size."""
        allowed = tolerance(precision, backend.device, self.dataset, backend.tf32)
        server = backend.target if isinstance(backend, RemoteBackend) else ""
        for size in sizes:
            place = (
                backend.file,
                backend.name,
                precision,
                backend.provider,
                backend.device,
                backend.tf32,
                server,
                size,
            )
            try:
                got = _answers(backend, self.images, size, on_images)
            except InvalidArgument as error:  # a file that opens, and cannot run these images
                yield Row(*place, not_compared(str(error)))
                continue
            comparison = compare_outputs(self.logits, got, allowed, self.labels)
            logits = np.asarray(got["logits"], np.float32)
            yield Row(*place, comparison, self._worst(comparison, logits), distribution(self.logits, logits))

    def _worst(self, comparison: Comparison, got: npt.NDArray[np.float32]) -> Worst | None:
        if comparison.passed or got.shape != self.logits.shape:
            return None
        index, n = comparison.worst, len(self.labels)
        name = f"test image {index}" if index < n else _EXTREMES[index - n]
        label = int(self.labels[index]) if index < n else None
        return Worst(index, name, label, tuple(self.logits[index].tolist()), tuple(got[index].tolist()))


def devices(spec: str) -> tuple[str, ...]:
    """The devices that `--device` names: `all` is the CPU and every CUDA device that the driver offers."""
    return ("cpu", *(f"cuda:{index}" for index in range(len(device_names())))) if spec == "all" else (spec,)


def check(
    bundle: Bundle,
    test: Split,
    device: str = "all",
    largest_batch: int = 1000,
    on_images: Callable[[int, int], None] = lambda *_: None,
    remote: RemoteBackend | None = None,
) -> Report:
    """Compare every file of a bundle with the reference.

    A file that cannot be opened is a failed row. With `all`, one that a CUDA device here cannot run is left out.

    Args:
        bundle: a version; its files are verified as they are opened.
        test: the test set, on the CPU.
        device: where the files run: `all`, `auto`, `cpu`, `cuda` or `cuda:N`.
        largest_batch: the largest batch size to try.
        on_images: called after every batch with its number of images, and with that of the whole comparison.
        remote: a server that serves the version, which is then compared too.

    Raises:
        BundleError: the weights or golden answers are missing or damaged, or the server runs a file of another bundle.
        DeviceError: the device that was named cannot be used.
    """
    network = reference(bundle)
    images, labels = np.concatenate([test.images.numpy(), extremes()]), test.labels.numpy()
    manifest = bundle.manifest
    wanted = _Wanted(images, labels, predict(network, torch.from_numpy(images)).numpy(), manifest.dataset)
    rows, left_out = [_golden_row(bundle, network), _manifest_row(bundle, wanted)], []
    sizes = batch_sizes(largest_batch)
    artefacts = manifest.artefacts()
    remote_sizes = batch_sizes(min(largest_batch, remote.max_batch_size)) if remote else ()
    total = len(images) * (len(artefacts) * len(devices(device)) * len(sizes) + len(remote_sizes))

    def advance(count: int) -> None:
        on_images(count, total)

    for file, (name, precision) in artefacts.items():
        for place in devices(device):
            try:
                if name in _CPU_ONLY and place.startswith("cuda"):
                    raise DeviceError(f"{name} is compiled for the CPU")
                backend = open_backend(name, bundle, place, Engine(torch.get_num_threads()), precision)
            except BundleError as error:
                rows.append(Row(file, name, precision, "", place, False, "", sizes[0], not_compared(str(error))))
            except DeviceError as error:
                if device != "all" and name not in _CPU_ONLY:
                    raise
                left_out.append(f"{file} on {place}: {error}")
            else:
                rows += wanted.rows(backend, precision, sizes, advance)
                if precision == "int8":
                    rows.append(_gate_row(bundle, backend))
                continue
            advance(len(images) * len(sizes))
    if remote:
        if remote.file not in artefacts or artefacts[remote.file][0] != remote.name:
            raise BundleError(
                f"{remote.target} runs {remote.file} with {remote.name}, which {bundle.path} does not have: "
                f"{', '.join(artefacts)}; name the folder of the version that the server serves"
            )
        rows += wanted.rows(remote, artefacts[remote.file][1], remote_sizes, advance)
    return Report(
        model=manifest.model,
        version=manifest.version,
        dataset=manifest.dataset,
        images=len(images),
        reference_accuracy=float((wanted.logits[: len(labels)].argmax(1) == labels).mean()),
        rows=tuple(rows),
        left_out=tuple(left_out),
    )


def _golden_row(bundle: Bundle, network: Network) -> Row:
    """Whether the golden answers are still those of the weights beside them."""
    image, logits = bundle.golden()
    again = predict(network, torch.from_numpy(image)).numpy()
    comparison = compare(again, logits, tolerance("fp32", "cpu"))
    worst = None
    if not comparison.passed:
        index = comparison.worst
        worst = Worst(index, f"golden image {index}", None, tuple(again[index].tolist()), tuple(logits[index].tolist()))
    return Row(GOLDEN, "eager", "fp32", "torch", "cpu", False, "", len(image), comparison, worst)


def _gate_row(bundle: Bundle, backend: Backend) -> Row:
    """Whether the server would take an int8 file: it judges that by other answers than the reference's."""
    comparison = golden_check(bundle, backend)
    place = (backend.name, "int8", backend.provider, backend.device, backend.tf32, "", comparison.n)
    return Row(GOLDEN, *place, comparison)


def _manifest_row(bundle: Bundle, wanted: _Wanted) -> Row:
    """Whether the manifest's labels are the data set's, and its accuracy, if of as many images, that of the weights."""
    labels, n = DATASETS[wanted.dataset].labels, len(wanted.labels)
    claimed = bundle.manifest.test_accuracy
    measured = float((wanted.logits[:n].argmax(1) == wanted.labels).mean())
    failures = []
    if claimed.n == n and abs(measured - claimed.value) * n > ACCURACY_IMAGES + 0.5:
        failures.append(f"the manifest claims an accuracy of {claimed.value:.4%}, its weights have {measured:.4%}")
    written = tuple(bundle.read(LABELS).decode(errors="replace").splitlines())
    for where, found in ((MANIFEST, bundle.manifest.labels), (LABELS, written)):
        if found != labels:
            failures.append(f"the labels of {where} are {', '.join(found)}; {wanted.dataset} has {', '.join(labels)}")
    comparison = Comparison(n, 0.0, 0.0, 1.0, measured, 0, tuple(failures))
    return Row(MANIFEST, "eager", "fp32", "torch", "cpu", False, "", EVALUATION_BATCH, comparison)


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
