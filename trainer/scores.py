"""What a classifier's answers are worth: accuracy with its interval, confusion, scores by class, calibration.

Arrays in, numbers out. The model card and the pictures both take their figures from here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]
Labels = npt.NDArray[np.integer]

Z95 = 1.959964  # standard normal quantile at 0.975: both tails together hold 5 %
BINS = 15  # the number that papers on calibration use: https://arxiv.org/abs/1706.04599


@dataclass(frozen=True)
class ClassScores:
    """How one class is recognised. A ratio of nothing to nothing is 0."""

    precision: float  # of the images called so, the fraction that are
    recall: float  # of the images that are, the fraction called so
    f1: float  # harmonic mean of the two
    support: int  # images that are


@dataclass(frozen=True)
class Calibration:
    """How far the probability of the class that was named agrees with how often it is right, by bins of it."""

    confidence: Floats  # [bins] mean probability of the named class; nan where the bin is empty
    right: Counts  # [bins] images in the bin that are right
    counts: Counts  # [bins] images in the bin
    error: float  # expected calibration error: mean |accuracy - confidence| of the bins, weighted by their images

    @property
    def accuracy(self) -> Floats:
        """Fraction right, [bins]; nan where the bin is empty."""
        return _ratio(self.right, self.counts, np.nan)


def wilson(right: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % unless `z` says otherwise.

    Unlike value ± z * sqrt(p(1-p)/n) it stays within 0 and 1 and holds its level near them, where accuracies lie.

    Raises:
        ValueError: there is no such proportion.
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"interval of a proportion: got {right} right of {n}, want 0 to n of at least 1")
    proportion = right / n
    middle = proportion + z * z / (2 * n)
    half = z * math.sqrt(proportion * (1 - proportion) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At 0 and n the proportion itself is an end, which rounding may miss by a bit.
    return (0.0 if right == 0 else (middle - half) / scale), (1.0 if right == n else (middle + half) / scale)


def confusion_matrix(labels: Labels, predicted: Labels, classes: int) -> Counts:
    """How often each true class (row) was called each class (column), [classes, classes]."""
    return np.bincount(classes * labels + predicted, minlength=classes * classes).reshape(classes, classes)


def class_scores(confusion: Counts) -> list[ClassScores]:
    """The scores of each class of a confusion matrix [classes, classes], in its order."""
    right, called, support = confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)
    rows = zip(_ratio(right, called), _ratio(right, support), _ratio(2 * right, called + support), support, strict=True)
    return [ClassScores(float(p), float(r), float(f1), int(n)) for p, r, f1, n in rows]


def calibration(probabilities: Floats, labels: Labels, bins: int = BINS) -> Calibration:
    """Compare how sure with how right, over probabilities [N, classes] and true classes [N]."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)  # exactly 1 belongs to the last bin
    counts = np.bincount(index, minlength=bins)
    right_counts = np.bincount(index[right], minlength=bins)
    totals = np.bincount(index, weights=confidence, minlength=bins)
    return Calibration(
        confidence=_ratio(totals, counts, np.nan),
        right=right_counts,
        counts=counts,
        error=float(np.abs(right_counts - totals).sum() / len(labels)),
    )


def _ratio(part: npt.NDArray[np.number], whole: npt.NDArray[np.number], empty: float = 0.0) -> Floats:
    """part / whole, elementwise, `empty` where the whole is 0."""
    result: Floats = np.divide(part, whole, out=np.full(len(whole), empty), where=whole > 0)
    return result
