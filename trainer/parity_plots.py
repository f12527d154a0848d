"""Pictures of comparisons: how far files are from the PyTorch model, and the images on which two versions differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from serving.parity import tolerance
from trainer.diff import Difference
from trainer.matrix import DIFFERENCE_EDGES, Report, Row
from trainer.plots import BLUE, GREY, VERMILION, new_figure

FLIPS_COLUMNS, FLIPS_SHOWN = 6, 18  # of each kind


def differences(report: Report) -> Figure:
    """How many logits are off by how much, a strip for each file and what ran it, beside its tolerance.

    The tolerance grows with the logit: drawn is that of a logit of 0.
    """
    strips: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        if row.differences:
            strips.setdefault((row.file, row.where), []).append(row)
    figure = new_figure(
        10,
        1.6 + 0.95 * max(1, len(strips)),
        f"{report.model} version {report.version}: how far logits are from PyTorch's, {report.images:,} images",
    )
    every = figure.subplots(max(1, len(strips)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, ((file, where), rows) in zip(every, strips.items(), strict=False):
        counts = np.sum([row.differences for row in rows], axis=0)
        passed = all(row.comparison.passed for row in rows)
        axes.stairs(counts / counts.max(), DIFFERENCE_EDGES, fill=True, color=BLUE if passed else VERMILION)
        allowed = tolerance(rows[0].precision, rows[0].device, report.dataset)
        if allowed.atol is None:
            text = "no bound on logits:\nclasses are judged"
            axes.text(0.99, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=9, color=GREY)
        else:
            axes.axvline(allowed.atol, color=GREY, linestyle="--")
            axes.axvspan(allowed.atol, DIFFERENCE_EDGES[-1], color=GREY, alpha=0.12, lw=0)
        axes.set_ylabel(f"{file}\n{where}", rotation=0, ha="right", va="center", fontsize=9)
        axes.set(yticks=[], ylim=(0, 1.1))
        axes.grid(alpha=0.3, axis="x")
    every[-1].set(
        xscale="log",
        xlim=(DIFFERENCE_EDGES[0], DIFFERENCE_EDGES[-1]),
        xlabel="|Δ logit|; the first bin has those that are equal",
    )
    handles = [
        every[0].fill_between([], [], color=BLUE, label="passes"),
        every[0].fill_between([], [], color=VERMILION, label="fails"),
        every[0].plot([], [], color=GREY, linestyle="--", label="tolerance of a logit of 0")[0],
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def flips(found: Difference, images: npt.NDArray[np.uint8], labels: Sequence[str]) -> Figure:
    """The images that one version has right and the other wrong, the first `FLIPS_SHOWN` of each kind.

    Args:
        found: the comparison.
        images: of the test set, uint8 [N, 1, 28, 28].
        labels: the classes' names.
    """
    kinds = (("right in A, wrong in B", found.lost), ("wrong in A, right in B", found.gained))
    rows = [max(1, -(-min(len(flips), FLIPS_SHOWN) // FLIPS_COLUMNS)) for _, flips in kinds]
    a, b = (f"{side.model} {side.version}" for side in (found.a, found.b))
    figure = new_figure(11, 1.6 + 2.3 * sum(rows), f"A: {a}, {found.a.accuracy:.2%}; B: {b}, {found.b.accuracy:.2%}")
    for part, (title, flips) in zip(
        figure.subfigures(2, 1, height_ratios=rows, squeeze=False).flat, kinds, strict=True
    ):
        count = f", the first {FLIPS_SHOWN} shown" if len(flips) > FLIPS_SHOWN else ""
        part.suptitle(f"{title}: {len(flips)} images{count}", fontsize=11)
        every = part.subplots(-(-max(1, min(len(flips), FLIPS_SHOWN)) // FLIPS_COLUMNS), FLIPS_COLUMNS, squeeze=False)
        for axes in every.flat:
            axes.set_axis_off()
        for axes, flip in zip(every.flat, flips, strict=False):
            axes.imshow(images[flip.index, 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(
                f"image {flip.index}: {labels[flip.label]}\nA: {labels[flip.answer_a]}\nB: {labels[flip.answer_b]}",
                fontsize=9,
            )
    return figure
