"""Write a trained network as a bundle: each artefact asked for, run and compared before the version appears."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from serving import bundle as bundles
from serving.backends import open_unverified
from serving.bundle import ARTEFACTS, GOLDEN, HISTORY, LABELS, Accuracy, Bundle, FileEntry, Manifest, ParityFigures
from serving.errors import ParityserveError
from serving.parity import softmax
from trainer import artefacts, parity, scores
from trainer.artefacts import INPUT, LOGITS, PROBABILITIES, Artefact
from trainer.checkpoint import Checkpoint
from trainer.config import CLASSES
from trainer.data import DATASETS, Split
from trainer.matrix import Report
from trainer.models import Deployed, Network, count_parameters
from trainer.report import model_card
from trainer.train import evaluate, predict

WEIGHTS = "weights.pt"
GOLDEN_TEST_IMAGES = 32

LIBRARIES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy")


class ExportError(ParityserveError):
    """The exported files do not answer like the network; nothing was published."""


def export(
    checkpoint: Checkpoint,
    test: Split,
    repository: Path,
    model: str | None = None,
    on_step: Callable[[str], None] = lambda _: None,
    chosen: Sequence[Artefact] = artefacts.DEFAULT,
    calibration: torch.Tensor | None = None,
) -> tuple[Bundle, Report]:
    """Write the next version of a model, prove it, and only then give it its number.

    Args:
        checkpoint: the trained network.
        test: the data set's test set on the CPU, for the golden images and the proof.
        repository: the model repository, such as `exported`.
        model: its name there; the data set's when not given.
        on_step: called with what is about to be done.
        chosen: the artefacts to write; `artefacts.choose` gives them.
        calibration: training images for int8, uint8 [N, 1, 28, 28]; `precisions.calibration_images` gives them.

    Returns:
        The published version and its parity report.

    Raises:
        ExportError: a written file does not answer like the network; the text has every failure.
        CheckpointError: the checkpoint's network cannot be built.
        ValueError: the model's name cannot be a folder's, or int8 is to be written without images to calibrate with.
    """
    network = checkpoint.build()
    if checkpoint.test_accuracy is None:  # the best or latest epoch of a training that may still go on
        checkpoint = replace(checkpoint, test_accuracy=evaluate(network, test)[1], test_images=len(test))
    with bundles.draft(repository, model or checkpoint.dataset) as folder:
        on_step("writing weights, history and labels")
        torch.save(network.state_dict(), folder / WEIGHTS)
        (folder / HISTORY).write_text(json.dumps(checkpoint.history, indent=2) + "\n", encoding="utf-8")
        labels = DATASETS[checkpoint.dataset].labels
        (folder / LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        about = _identity(checkpoint, folder.parent.name)
        artefacts.write(Deployed(network).eval(), chosen, folder, about, calibration, on_step)
        _write_golden(network, test, folder, [ARTEFACTS[pair] for pair in chosen if pair[1] == "int8"])
        on_step("comparing the written files with PyTorch")
        draft = Bundle(folder, _manifest(checkpoint, network, folder, chosen))
        report = parity.check(draft, test, device="cpu")
        failures = [
            f"{row.file}, batch {row.batch_size}: {failure}"
            for row in report.rows
            for failure in row.comparison.failures
        ]
        if failures:
            raise ExportError("nothing was exported, the files do not answer like PyTorch: " + "; ".join(failures))
        on_step("writing the model card")
        published = bundles.publish(folder, _with_parity(draft.manifest, report), _card(network, test))
    return published, report


def _card(network: Network, test: Split) -> Callable[[Manifest], str]:
    """What gives the model card of a network's version, with its answers on the test set."""
    labels, probabilities = test.labels.numpy(), softmax(predict(network, test.images).numpy())
    confusion = scores.confusion_matrix(labels, probabilities.argmax(axis=1), CLASSES)
    calibration = scores.calibration(probabilities, labels)
    return lambda manifest: model_card(manifest, confusion, calibration)


def _write_golden(network: Network, test: Split, folder: Path, int8_files: Sequence[str]) -> None:
    image = np.concatenate([test.images[:GOLDEN_TEST_IMAGES].numpy(), parity.extremes()])
    answers: dict[str, Any] = {"logits": predict(network, torch.from_numpy(image)).numpy()}
    for file in int8_files:  # not proved yet: nothing is published until they are
        answers[file] = open_unverified(folder / file, "cpu").run({INPUT.name: image})[LOGITS.name]
    np.savez_compressed(folder / GOLDEN, image=image, **answers)


def _identity(checkpoint: Checkpoint, model: str) -> dict[str, str]:
    """What the ONNX file says about itself, for a reader who has only that file."""
    return {
        "model": model,
        "dataset": checkpoint.dataset,
        "labels": json.dumps(DATASETS[checkpoint.dataset].labels),
        "network": checkpoint.config.name,
        "test_accuracy": str(checkpoint.test_accuracy),
        "source_revision": source_revision() or "",
    }


def _manifest(checkpoint: Checkpoint, network: Network, folder: Path, chosen: Sequence[Artefact]) -> Manifest:
    assert checkpoint.test_accuracy is not None, "measured where it was not known"
    assert checkpoint.test_images is not None, "known with the accuracy"
    files: dict[str, FileEntry] = {name: bundles.entry(folder / name) for name in (GOLDEN, LABELS, HISTORY)}
    files[WEIGHTS] = bundles.entry(folder / WEIGHTS, backend="eager", precision="fp32")
    for backend, precision in chosen:
        name = ARTEFACTS[backend, precision]
        files[name] = bundles.entry(folder / name, backend=backend, precision=precision)
    return Manifest(
        model=folder.parent.name,
        version=1,  # the number is given when the version is published
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        dataset=checkpoint.dataset,
        labels=DATASETS[checkpoint.dataset].labels,
        inputs=(INPUT,),
        outputs=(LOGITS, PROBABILITIES),
        files=files,
        network=checkpoint.config.name,
        parameters=count_parameters(network),
        training=checkpoint.training,
        source_revision=source_revision(),
        test_accuracy=Accuracy(value=checkpoint.test_accuracy, n=checkpoint.test_images),
        libraries={name: version for name in LIBRARIES if (version := _version(name))},
    )


def _with_parity(manifest: Manifest, report: Report) -> Manifest:
    """The manifest with the figures of each file's worst batch size beside the reference."""
    files = dict(manifest.files)
    for name in {row.file for row in report.rows} & set(files):
        # Golden answers are fp32, and those of the reference; an int8 file's own are compared with itself.
        rows = [row for row in report.rows if row.file == name and row.precision == (files[name].precision or "fp32")]
        worst = max(rows, key=lambda row: row.comparison.max_abs).comparison
        figures = ParityFigures(
            device=rows[0].device,
            n=worst.n,
            batch_sizes=tuple(row.batch_size for row in rows),
            max_abs=worst.max_abs,
            mean_abs=worst.mean_abs,
            top1_agreement=min(row.comparison.top1_agreement for row in rows),
        )
        files[name] = files[name].model_copy(update={"parity": figures})
    return manifest.model_copy(update={"files": files})


def source_revision() -> str | None:
    """The git revision of this source, `-dirty` when it has changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")).resolve() != root:
            return None  # installed inside another project's checkout
        return _git(root, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
