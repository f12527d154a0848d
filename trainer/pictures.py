"""Every picture of one network: the arrays that `trainer/plots.py` draws, and the files."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from serving.bundle import HISTORY, Bundle
from serving.parity import softmax
from trainer import features, parity, plots, scores
from trainer.checkpoint import Checkpoint
from trainer.data import DATASETS, Split
from trainer.train import predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Subject:
    """A network to draw pictures of."""

    name: str  # what the titles call it
    network: nn.Module
    dataset: str
    history: plots.History  # empty when it is not known
    folder: Path  # where its pictures go unless told otherwise


def of_bundle(bundle: Bundle) -> Subject:
    """A version's network. Its pictures go beside it, for a version is never changed: `<model>/plots/<version>/`.

    Raises:
        BundleError: its weights or its history are damaged, or its network is not known.
    """
    manifest = bundle.manifest
    version = str(manifest.version)
    path = bundle.path if bundle.path.name == version else bundle.path.resolve()
    return Subject(
        name=f"{manifest.model} version {version}",
        network=parity.reference(bundle),
        dataset=manifest.dataset,
        history=json.loads(bundle.read(HISTORY)) if HISTORY in manifest.files else (),
        folder=path.parent / "plots" / version,
    )


def of_checkpoint(checkpoint: Checkpoint, path: Path) -> Subject:
    """The network of a checkpoint read from `path`. Its pictures go beside that, into `<name>-plots/`.

    Raises:
        CheckpointError: its network cannot be built.
    """
    folder = path.with_name(f"{path.stem}-plots")
    return Subject(path.name, checkpoint.build(), checkpoint.dataset, checkpoint.history, folder)


def figures(subject: Subject, test: Split, images: Sequence[int]) -> Iterator[tuple[str, Figure]]:
    """Every picture of a network, each after the name of its file without ending.

    Left out is what a network does not have: the curves without a history, the maps without a convolution, the filters
    where the first layer's are not pictures.

    Args:
        subject: the network, on the device of `test`.
        test: the images to judge it by.
        images: which of them get their feature maps drawn, from 0.

    Raises:
        ValueError: there is no such image.
    """
    for index in images:
        if not 0 <= index < len(test):
            raise ValueError(f"--images: got {index}, want 0 to {len(test) - 1}: images of the test set")
    network, name, labels = subject.network, subject.name, DATASETS[subject.dataset].labels
    truth, pixels = test.labels.cpu().numpy(), test.images.cpu().numpy()
    probabilities = softmax(predict(network, test.images).cpu().numpy())
    if subject.history:
        yield "curves", plots.curves(subject.history, f"Training of {name}")
    confusion = scores.confusion_matrix(truth, probabilities.argmax(axis=1), len(labels))
    yield "confusion-matrix", plots.confusion_matrix(confusion, labels, f"Confusion matrix of {name}")
    yield "worst-mistakes", plots.worst_mistakes(pixels, truth, probabilities, labels, f"Worst mistakes of {name}")
    yield "reliability", plots.reliability(scores.calibration(probabilities, truth), f"Reliability of {name}")
    filters = features.first_filters(network)
    if filters is not None:
        yield "first-layer-filters", plots.first_layer_filters(filters.numpy(), f"First layer of {name}")
    for index in images:
        maps = {layer: found.numpy() for layer, found in features.feature_maps(network, test.images[index]).items()}
        if maps:
            title = f"Test image {index} of class {labels[truth[index]]} in {name}"
            yield (
                f"feature-maps-{index}",
                plots.feature_maps(pixels[index, 0], probabilities[index], labels, maps, title),
            )


def write(folder: Path, pictures: Iterable[tuple[str, Figure]]) -> list[Path]:
    """Save each picture as a PNG in a folder, which is made; a file appears complete or not at all. Gives the paths."""
    paths = []
    for name, figure in pictures:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.png"
        draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        try:
            figure.savefig(draft, format="png")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        paths.append(path)
    return paths
