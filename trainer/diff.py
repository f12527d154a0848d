"""Two versions beside each other on the same test images: what one reads before the newer takes over."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serving.bundle import Bundle
from trainer.data import Split
from trainer.parity import reference
from trainer.scores import wilson
from trainer.train import predict

SIGNIFICANT = 0.05  # a p-value below is called more than chance, as the 95 % of the intervals


@dataclass(frozen=True)
class Side:
    """One of the two versions, and how right it is."""

    model: str
    version: int
    network: str
    parameters: int
    right: int  # of all images
    accuracy: float
    low: float  # Wilson's interval of the accuracy, 95 %
    high: float


@dataclass(frozen=True)
class ClassChange:
    """How many images of one class each version has right."""

    label: str
    images: int
    right_a: int
    right_b: int


@dataclass(frozen=True)
class Flip:
    """A test image that one version has right and the other wrong."""

    index: int
    label: int
    answer_a: int
    answer_b: int


@dataclass(frozen=True)
class Difference:
    """What changes from version A to version B."""

    a: Side
    b: Side
    images: int
    agreement: float  # fraction of images with the same answer, right or not
    classes: tuple[ClassChange, ...]
    lost: tuple[Flip, ...]  # right in A, wrong in B
    gained: tuple[Flip, ...]  # wrong in A, right in B
    p_value: float  # McNemar's exact test of lost against gained, two-sided

    @property
    def verdict(self) -> str:
        """The difference in accuracy as a sentence."""
        if self.p_value >= SIGNIFICANT:
            return f"the two cannot be told apart by these images (McNemar's p = {self.p_value:.2g})"
        better = "better" if len(self.gained) > len(self.lost) else "worse"
        return f"B is {better} than A by more than chance (McNemar's p = {self.p_value:.2g})"

    def document(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "verdict": self.verdict}


def compare_versions(a: Bundle, b: Bundle, test: Split) -> Difference:
    """Compare the PyTorch networks of two versions.

    Args:
        a: the version that is served, say.
        b: the version that shall follow it.
        test: the test set of their data set, on the CPU.

    Raises:
        BundleError: weights are damaged or of an unknown network.
        ValueError: the two are not of one data set.
    """
    if a.manifest.dataset != b.manifest.dataset:
        raise ValueError(
            f"{a.path} is of {a.manifest.dataset} and {b.path} of {b.manifest.dataset}: "
            "only versions of one data set can be compared"
        )
    truth = test.labels.numpy()
    answers_a, answers_b = (predict(reference(bundle), test.images).argmax(1).numpy() for bundle in (a, b))
    right_a, right_b = answers_a == truth, answers_b == truth
    lost, gained = (
        tuple(
            Flip(index, int(truth[index]), int(answers_a[index]), int(answers_b[index]))
            for index in np.flatnonzero(chosen).tolist()
        )
        for chosen in (right_a & ~right_b, right_b & ~right_a)
    )
    classes = tuple(
        ClassChange(label, int(mine.sum()), int(right_a[mine].sum()), int(right_b[mine].sum()))
        for number, label in enumerate(a.manifest.labels)
        if (mine := truth == number).any()
    )
    return Difference(
        a=_side(a, right_a),
        b=_side(b, right_b),
        images=len(truth),
        agreement=float((answers_a == answers_b).mean()),
        classes=classes,
        lost=lost,
        gained=gained,
        p_value=mcnemar(len(lost), len(gained)),
    )


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact test, two-sided: how likely a split at least as uneven is if each flip is a toss of a coin."""
    n, few = lost + gained, min(lost, gained)
    tail = sum(math.comb(n, k) for k in range(few + 1))
    return min(1.0, float(2 * tail / 2**n))


def _side(bundle: Bundle, right: npt.NDArray[np.bool_]) -> Side:
    manifest, count = bundle.manifest, int(right.sum())
    low, high = wilson(count, len(right))
    return Side(
        manifest.model,
        manifest.version,
        manifest.network,
        manifest.parameters,
        count,
        count / len(right),
        low,
        high,
    )
