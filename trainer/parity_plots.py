"""Pictures of comparisons: how far files are from the PyTorch model, and the images on which two versions differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from serving.parity import tolerance
from trainer.diff import Difference
from trainer.matrix import DIFFERENCE_EDGES, Report, Row
from trainer.plots import BLUE, GREY, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLIPS_COLUMNS, FLIPS_SHOWN = 6, 18  # of each kind


def differences(report: Report) -> Figure:
    """How many logits are off by how much, a strip for each file and what ran it, beside its tolerance.

    The tolerance grows with the logit: drawn is that of a logit of 0. Counts are on a log scale.
    """
    strips: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        if row.differences:
            strips.setdefault((row.file, row.where), []).append(row)
    title = f"{report.model} version {report.version}: how far logits are from PyTorch's"
    what = f"{report.images:,} images at every batch size, counts of logits on a log scale"
    figure = new_figure(10, 1.9 + 0.95 * max(1, len(strips)), f"{title}\n{what}")
    every = figure.subplots(max(1, len(strips)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, ((file, where), rows) in zip(every, strips.items(), strict=False):
        counts = np.sum([row.differences for row in rows], axis=0)
        passed = all(row.comparison.passed for row in rows)
        colour = BLUE if passed else VERMILION
        axes.stairs(counts, DIFFERENCE_EDGES, fill=True, baseline=0.5, color=colour)
        allowed = tolerance(rows[0].precision, rows[0].device, report.dataset, rows[0].tf32)
        if allowed.atol is None:
            text = "no bound on logits:\nclasses are judged"
            axes.text(0.99, 0.5, text, transform=axes.transAxes, ha="right", va="center", fontsize=9, color=GREY)
        else:
            axes.axvline(allowed.atol, color=GREY, linestyle="--")
            axes.axvspan(allowed.atol, DIFFERENCE_EDGES[-1], color=GREY, alpha=0.12, lw=0)
        axes.set_ylabel(f"{file}\n{where}", rotation=0, ha="right", va="center", fontsize=9)
        axes.set(yscale="log", ylim=(0.5, 3 * counts.max()))  # so that a single logit is seen
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
    heights = [0.6 + 2.3 * count for count in rows]
    a, b = (f"{side.model} {side.version}" for side in (found.a, found.b))
    figure = new_figure(11, 0.6 + sum(heights), f"A: {a}, {found.a.accuracy:.2%}; B: {b}, {found.b.accuracy:.2%}")
    parts = figure.subfigures(2, 1, height_ratios=heights, squeeze=False).flat
    for part, count, (title, flips) in zip(parts, rows, kinds, strict=True):
        shown = f", the first {FLIPS_SHOWN} shown" if len(flips) > FLIPS_SHOWN else ""
        part.suptitle(f"{title}: {len(flips)} images{shown}", fontsize=11)
        every = part.subplots(count, FLIPS_COLUMNS, squeeze=False)
        for axes in every.flat:
            axes.set_axis_off()
        for axes, flip in zip(every.flat, flips, strict=False):
            axes.imshow(images[flip.index, 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(
                f"image {flip.index}: {labels[flip.label]}\nA: {labels[flip.answer_a]}\nB: {labels[flip.answer_b]}",
                fontsize=9,
            )
    return figure
