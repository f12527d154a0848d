"""The model card: what a version is and how good, for a person who has only its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serving.bundle import HISTORY, Manifest
from trainer.scores import Calibration, Counts, class_scores, wilson


def model_card(manifest: Manifest, confusion: Counts, calibration: Calibration) -> str:
    """The card in Markdown.

    Args:
        manifest: of the version, with its number and parity figures.
        confusion: of the PyTorch model on the test set, rows the true classes, [classes, classes].
        calibration: of the same answers.
    """
    sections = [
        f"# {manifest.model}, version {manifest.version}",
        _summary(manifest, confusion, calibration),
        "## Serve it",
        _serve(manifest),
        "## Accuracy by class",
        _by_class(manifest.labels, confusion),
        "## Confusion matrix",
        "Rows are the true classes, columns what the network said; a dot is a zero.",
        _confusion(manifest.labels, confusion),
        "## Parity",
        _parity(manifest),
        "## Training",
        _training(manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _summary(manifest: Manifest, confusion: Counts, calibration: Calibration) -> str:
    right, n = int(confusion.trace()), int(confusion.sum())
    low, high = wilson(right, n)
    classes = ", ".join(manifest.labels)
    image = manifest.inputs[0]
    rows = [
        ("data set", f"{manifest.dataset}: {len(manifest.labels)} classes ({classes})"),
        ("network", f"{manifest.network}, {manifest.parameters:,} parameters"),
        ("test accuracy", f"{right / n:.2%} of {n:,} images, 95 % confidence interval {low:.2%} to {high:.2%}"),
        ("calibration", f"expected calibration error {calibration.error:.2%} in {len(calibration.counts)} bins"),
        ("input", f"`{image.name}`, {image.datatype} {image.shape_text()}, raw pixels, light on dark"),
        ("outputs", ", ".join(f"`{out.name}`, {out.datatype} {out.shape_text()}" for out in manifest.outputs)),
        ("made", f"{manifest.created}, source revision {manifest.source_revision or 'unknown'}"),
    ]
    text = (
        "The interval is Wilson's: what chance in the choice of test images would give. "
        "How far another seed would come out is not in it."
    )
    return f"{_table(('', ''), rows)}\n\n{text}"


def _serve(manifest: Manifest) -> str:
    return f"""`exported` stands for the model repository, the folder that holds `{manifest.model}/{manifest.version}/`.

```sh
python -m serving serve --repository exported --model {manifest.model}
python -m serving predict picture.png --model {manifest.model}
python -m trainer parity --bundle exported/{manifest.model}/{manifest.version}
python -m trainer plots --bundle exported/{manifest.model}/{manifest.version}
```

The first serves the model's newest version, the second classifies pictures on that server, the third proves every
file again on this machine, the fourth draws how the network was trained and where it errs. No file here may be
changed: the server refuses a version whose files do not have the sha256 that `manifest.json` lists."""


def _by_class(labels: Sequence[str], confusion: Counts) -> str:
    scores = class_scores(confusion)
    rows = [
        (label, f"{row.precision:.2%}", f"{row.recall:.2%}", f"{row.f1:.2%}", f"{row.support:,}")
        for label, row in zip(labels, scores, strict=True)
    ]
    return _table(("class", "precision", "recall", "f1", "support"), rows)


def _confusion(labels: Sequence[str], confusion: Counts) -> str:
    """As preformatted text: as a Markdown table it could only be read rendered. Columns are numbered to be narrow."""
    numbers = [str(index) for index in range(len(labels))]
    heads = [number if number == label else f"{number} {label}" for number, label in zip(numbers, labels, strict=True)]
    names = max(map(len, heads))
    width = len(str(max(confusion.max(), len(labels)))) + 2
    lines = [" " * names + "".join(f"{number:>{width}}" for number in numbers)]
    for head, row in zip(heads, confusion.tolist(), strict=True):
        lines.append(f"{head:<{names}}" + "".join(f"{count or '.':>{width}}" for count in row))
    return "\n".join(["```text", *lines, "```"])


def _parity(manifest: Manifest) -> str:
    rows = [
        (
            f"`{name}`",
            found.device,
            f"{found.n:,}",
            ", ".join(map(str, found.batch_sizes)),
            f"{found.max_abs:.1e}",
            f"{found.mean_abs:.1e}",
            f"{found.top1_agreement:.2%}",
        )
        for name, entry in manifest.files.items()
        if (found := entry.parity)
    ]
    text = "How far each file's logits were from eager PyTorch's (fp32, CPU) when the version was exported."
    return f"{text}\n\n{_table(('file', 'on', 'images', 'batch sizes', 'max |Δ|', 'mean |Δ|', 'same class'), rows)}"


def _training(manifest: Manifest) -> str:
    rows = [(f"`{name}`", _value(value)) for name, value in manifest.training.items()]
    libraries = ", ".join(f"{name} {version}" for name, version in manifest.libraries.items())
    text = f"Losses and accuracies of every epoch stand in `{HISTORY}`. Made with {libraries}."
    return f"{_table(('setting', 'value'), rows)}\n\n{text}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
