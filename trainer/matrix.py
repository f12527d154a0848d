"""The parity matrix of a version: its rows, and how people, JSON and CI read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from rich.markup import escape
from rich.table import Table

from serving.bundle import GOLDEN, MANIFEST
from serving.parity import Comparison

# Where the counts of `Row.differences` begin and end: four bins a decade.
DIFFERENCE_EDGES = np.logspace(-9, 2, 45)


@dataclass(frozen=True)
class Worst:
    """The image of a failed row that is furthest off."""

    index: int  # of the images that the row compared: the test set, then the extremes
    image: str  # `test image 17`, `all 255`, `noise 3`
    label: int | None  # its true class, of a test image
    reference: tuple[float, ...]  # logits [classes]
    candidate: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One line of the parity table: a file on a device or a server, with one batch size."""

    file: str
    backend: str
    precision: str
    provider: str  # as read back; empty where the file could not be opened
    device: str
    tf32: bool  # whether a GPU might multiply in TF32
    server: str  # host:port; empty for what ran in this process
    batch_size: int
    comparison: Comparison
    worst: Worst | None = None  # of a row that failed with answers
    differences: tuple[int, ...] = ()  # how many logits were off by how much, by the bins of DIFFERENCE_EDGES

    @property
    def where(self) -> str:
        """What ran the file, as people read it."""
        if self.server:
            return f"server {self.server}"
        return f"{self.provider.removesuffix('ExecutionProvider')} on {self.device}" if self.provider else self.device


@dataclass(frozen=True)
class Report:
    """The parity table of one version."""

    model: str
    version: int
    dataset: str
    images: int
    reference_accuracy: float
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()  # files that a device here cannot run, each with its cause

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.comparison.passed for row in self.rows)

    def document(self) -> dict[str, Any]:
        """The report as JSON takes it; a number that is none, or has no end, is null."""
        rows = [{**asdict(row), "passed": row.comparison.passed} for row in self.rows]
        document: dict[str, Any] = _finite({**asdict(self), "rows": rows, "passed": self.passed})
        return document


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def distribution(want: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> tuple[int, ...]:
    """How many logits are off by how much; what lies beyond the edges, or is no number, counts in the outermost bin."""
    if got.shape != want.shape:
        return ()
    off = np.nan_to_num(np.abs(got.astype(np.float64) - want), nan=np.inf)
    counts, _ = np.histogram(np.clip(off, DIFFERENCE_EDGES[0], DIFFERENCE_EDGES[-1]), DIFFERENCE_EDGES)
    return tuple(counts.tolist())


def table(report: Report) -> Table:
    """The matrix as a terminal shows it."""
    shown = Table(
        title=f"{report.model} version {report.version} against eager PyTorch, fp32, CPU\n"
        f"{report.images} images, reference accuracy {report.reference_accuracy:.2%}",
        caption="\n".join(
            sorted({f"{row.where}: {row.provider} on {row.device}" for row in report.rows if row.server})
        ),
    )
    left = ("file", "precision", "where")
    for column in (*left, "batch", "max |Δ|", "mean |Δ|", "same class", "accuracy", "verdict"):
        shown.add_column(column, no_wrap=True, justify="left" if column in left else "right")
    for row in report.rows:
        found = row.comparison
        shown.add_row(
            row.file,
            row.precision,
            escape(row.where),
            str(row.batch_size),
            *(f"{value:.1e}" if np.isfinite(value) else "" for value in (found.max_abs, found.mean_abs)),
            f"{found.top1_agreement:.2%}" if found.n else "",
            "" if found.accuracy is None else f"{found.accuracy:.2%}",
            "[green]pass[/green]" if found.passed else "[red]FAIL[/red]",
        )
    return shown


def failures(report: Report, labels: Sequence[str]) -> Iterator[tuple[Row, str]]:
    """Each failed row with what is wrong, the worst image and what to do, as text.

    A file fails at every batch size alike as a rule: the image and the advice come with the first of them.

    Args:
        report: the matrix.
        labels: the classes' names.
    """
    told = set()
    for row in report.rows:
        if row.comparison.passed:
            continue
        lines = list(row.comparison.failures)
        if (row.file, row.where) not in told:
            told.add((row.file, row.where))
            if row.worst:
                lines += _worst(row.worst, labels)
            lines.append(f"What to do: {_remedy(row)}")
        yield row, "\n".join(lines)


def _worst(worst: Worst, labels: Sequence[str]) -> list[str]:
    label = "" if worst.label is None else f", a {labels[worst.label]} (class {worst.label})"
    return [
        f"worst image: {worst.image}{label}",
        *(
            f"  {name:9} " + " ".join(f"{value:10.4f}" for value in logits)
            for name, logits in (("PyTorch", worst.reference), ("candidate", worst.candidate))
        ),
    ]


def _remedy(row: Row) -> str:
    if row.file in (GOLDEN, MANIFEST):
        return f"{row.file} was changed, or is of other weights: restore it, or export the model again"
    if row.server:
        return (
            "see whether the file fails in this process too: then export the model again; if it does not, the server "
            "runs other bytes under this number: compare manifest.sha256 there with the one here, and copy the version"
        )
    remedy = f"{row.file} does not hold the network of weights.pt: restore it, or export the model again"
    return f"{remedy}; --bisect names the first layer that differs" if row.backend == "onnx" and row.worst else remedy


def write_junit(report: Report, labels: Sequence[str], path: Path) -> None:
    """Write the matrix as JUnit's XML, which CI systems show: a test case for each row."""
    texts = dict(failures(report, labels))
    suite = ElementTree.Element(
        "testsuite",
        name=f"parity of {report.model} version {report.version}",
        tests=str(len(report.rows) + len(report.left_out)),
        failures=str(len(texts)),
        errors="0",
        skipped=str(len(report.left_out)),
    )
    for row in report.rows:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"{row.file} {row.precision}",
            name=f"{row.where}, batch {row.batch_size}",
        )
        if row in texts:
            text = _printable(texts[row])
            ElementTree.SubElement(case, "failure", message=text.partition("\n")[0]).text = text
    for text in report.left_out:
        file, _, cause = text.partition(": ")
        case = ElementTree.SubElement(suite, "testcase", classname="left out", name=file)
        ElementTree.SubElement(case, "skipped", message=_printable(cause))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold; errors of runtimes may have them."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
