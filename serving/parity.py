"""Compare answers with the PyTorch model's: the one table of tolerances, and the comparison that uses it.

The reference is always eager PyTorch in fp32 on the CPU. The server's load gate and `python -m trainer parity`
both judge by this table. A tolerance is never raised to make a check pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Tolerance:
    """How far an answer may be from the reference's.

    A logit passes when |candidate - reference| <= atol + rtol * |reference|; any finite one does when atol is None.
    """

    atol: float | None
    rtol: float
    top1_agreement: float  # smallest accepted fraction, not counting ties closer than the tolerance
    accuracy_pp: float  # largest accepted difference in accuracy, percentage points
    reason: str


TOLERANCES: dict[tuple[str, str], Tolerance] = {
    # (precision, kind of device, or data set where the device does not matter)
    ("fp32", "cpu"): Tolerance(
        1e-4, 1e-4, 1.0, 0.0, "fp32 sums in another order: about 1e-6 was seen, a wrong weight shows from 1e-3 up"
    ),
    ("fp32", "cuda"): Tolerance(
        2e-4, 1e-3, 0.9999, 0.01, "cuDNN picks other algorithms by shape; with TF32 off these are still fp32 sums"
    ),
    ("tf32", "cuda"): Tolerance(
        2e-2, 1e-2, 0.999, 0.05, "TF32 keeps 10 bits of the mantissa of what is multiplied; asked for, never a default"
    ),
    ("fp16", "cpu"): Tolerance(5e-2, 2e-2, 0.998, 0.05, "weights rounded to 11 bits; sums too where fp16 is native"),
    ("fp16", "cuda"): Tolerance(5e-2, 2e-2, 0.998, 0.05, "weights, activations and sums rounded to 11 bits"),
    ("int8", "mnist"): Tolerance(
        None,
        0.0,
        0.99,
        0.3,
        "256 steps for every activation: logits move by tenths, so classes are what is judged",
    ),
    ("int8", "fashion-mnist"): Tolerance(
        None, 0.0, 0.97, 0.7, "the same, where more images lie between two classes: shirt, pullover, coat"
    ),
}


def tolerance(precision: str, device: str, dataset: str = "", tf32: bool = False) -> Tolerance:
    """The tolerance for a file's answers.

    Args:
        precision: the file's.
        device: what runs it, such as `cpu` or `cuda:0`.
        dataset: the model's; matters to int8 alone, where one that is not in the table is held to MNIST's row.
        tf32: whether CUDA was allowed to multiply in TF32.
    """
    if precision == "int8":
        return TOLERANCES.get((precision, dataset), TOLERANCES[precision, "mnist"])
    kind = device.partition(":")[0]
    return TOLERANCES["tf32" if tf32 and (precision, kind) == ("fp32", "cuda") else precision, kind]


INT8_LAYER = 0.25  # of the layer's range: up to 0.13 was seen, for noise that no range had been calibrated with


def layer_tolerance(precision: str, device: str, reference: npt.NDArray[np.floating]) -> Tolerance:
    """How far the values of one layer may be from the reference's, which are any shape.

    Logits follow from layers: the table holds for these too, but that there are no classes to judge. int8, which has no
    bound on logits, is held to a share of the layer's range.
    """
    allowed = tolerance(precision, device)
    if allowed.atol is None:
        allowed = replace(allowed, atol=INT8_LAYER * float(reference.max() - reference.min()), rtol=0.0)
    return replace(allowed, top1_agreement=0.0)


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; it passed when `failures` is empty."""

    n: int
    max_abs: float  # largest |candidate - reference| over all logits
    mean_abs: float
    top1_agreement: float  # fraction of images with the same class, ties closer than the tolerance not counted against
    accuracy: float | None  # of the candidate, when labels were given
    worst: int  # index of the image with the largest excess over the tolerance, or difference where that has no bound
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the candidate answers like the reference."""
        return not self.failures


def not_compared(reason: str, n: int = 0) -> Comparison:
    """The comparison that failed before any answer of `n` images could be compared."""
    return Comparison(n, np.inf, np.inf, 0.0, None, 0, (reason,))


def compare(reference: Floats, candidate: Floats, allowed: Tolerance, labels: Labels | None = None) -> Comparison:
    """Compare a candidate's logits with the reference's, both float32 [N, classes], and collect every failure.

    Args:
        reference: what eager PyTorch answered on the CPU.
        candidate: what the file, backend or server under test answered for the same images.
        allowed: the row of `TOLERANCES` for the candidate's precision and device.
        labels: true classes of the first M images, integer [M]; gives the accuracies.

    Raises:
        ValueError: the reference is empty: a comparison of nothing would always pass.
    """
    if reference.size == 0:
        raise ValueError("nothing to compare: the reference has no logits")
    if candidate.shape != reference.shape:
        return not_compared(f"shape {list(candidate.shape)}, want {list(reference.shape)}", len(reference))
    difference = np.nan_to_num(np.abs(candidate.astype(np.float64) - reference), nan=np.inf)
    # Written so that a NaN in the candidate is a failure, not a comparison that is quietly false.
    excess = np.where(np.isfinite(candidate), difference - _margin(reference, allowed), np.inf)
    agreement = _top1_agreement(reference, candidate, allowed)
    failures = []
    if not np.isfinite(reference).all():
        failures.append("the reference itself has logits that are not numbers: nothing can be compared with it")
    if excess.max() > 0:
        row, column = np.unravel_index(excess.argmax(), excess.shape)
        within = "" if allowed.atol is None else f" within {allowed.atol:g} + {allowed.rtol:g} * |want|"
        failures.append(
            f"{int((excess > 0).sum())} of {excess.size} logits are off, the worst in image {row}, class {column}: "
            f"{candidate[row, column]:.6g}, want {reference[row, column]:.6g}{within}"
        )
    if not agreement >= allowed.top1_agreement:
        failures.append(f"top-1 agreement {agreement:.4%}, want at least {allowed.top1_agreement:.2%}")
    accuracy = None
    if labels is not None:
        n = len(labels)
        accuracy = float((candidate[:n].argmax(1) == labels).mean())
        gap_pp = 100 * abs(accuracy - float((reference[:n].argmax(1) == labels).mean()))
        if gap_pp > allowed.accuracy_pp + 100 * _tied(reference[:n], allowed).mean():
            failures.append(f"accuracy differs by {gap_pp:.3f} pp, want at most {allowed.accuracy_pp} pp")
    return Comparison(
        n=len(reference),
        max_abs=float(difference.max()),
        mean_abs=float(difference.mean()),
        top1_agreement=agreement,
        accuracy=accuracy,
        worst=int((difference if allowed.atol is None else excess).max(axis=1).argmax()),
        failures=tuple(failures),
    )


def compare_outputs(
    reference: Floats, outputs: Mapping[str, Any], allowed: Tolerance, labels: Labels | None = None
) -> Comparison:
    """Compare both outputs of a classifier: `logits` with the reference's logits, `probabilities` with their softmax.

    The figures are of the logits; the failures are of both.
    """
    result = compare(reference, np.asarray(outputs["logits"], np.float32), allowed, labels)
    probabilities = compare(softmax(reference), np.asarray(outputs["probabilities"], np.float32), allowed)
    failures = [f"logits: {failure}" for failure in result.failures]
    failures += [f"probabilities: {failure}" for failure in probabilities.failures]
    return replace(result, failures=tuple(failures))


def softmax(logits: Floats) -> Floats:
    """Probabilities float32 [N, classes] of logits [N, classes]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), np.float32)


def _margin(reference: Floats, allowed: Tolerance) -> npt.NDArray[np.float64]:
    """How far each logit may be off, [N, classes]."""
    if allowed.atol is None:
        return np.full(reference.shape, np.inf)
    return allowed.atol + allowed.rtol * np.abs(reference.astype(np.float64))


def _tied(reference: Floats, allowed: Tolerance) -> npt.NDArray[np.bool_]:
    """Images whose two best classes in the reference are closer than the tolerance, [N]; none where it has no bound."""
    if allowed.atol is None:
        return np.zeros(len(reference), np.bool_)
    second, first = np.partition(reference, -2, axis=1)[:, -2:].T
    return np.asarray(first - second <= allowed.atol + allowed.rtol * np.abs(first))


def _top1_agreement(reference: Floats, candidate: Floats, allowed: Tolerance) -> float:
    agrees = (reference.argmax(1) == candidate.argmax(1)) | _tied(reference, allowed)
    return float(agrees.mean())
