import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import MODEL, edit_manifest, rehash
from onnx import numpy_helper

from serving.bundle import GOLDEN, MANIFEST, open_bundle
from serving.errors import BundleError
from serving.parity import TOLERANCES, compare, compare_outputs, softmax, tolerance
from trainer import matrix, parity
from trainer.data import DATASETS

ROOT = Path(__file__).parents[1]
CPU = tolerance("fp32", "cpu")
LABELS = DATASETS[MODEL].labels


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 5, (200, 10)).astype(np.float32)


def change_weight(version, factor):
    """Multiply one weight of the ONNX file and hide it from the hash."""
    model = onnx.load(version / "model.onnx")
    kernel = next(init for init in model.graph.initializer if list(init.dims) == [64, 32, 3, 3])
    weights = numpy_helper.to_array(kernel).copy()
    weights[tuple(np.unravel_index(np.abs(weights).argmax(), weights.shape))] *= factor
    kernel.CopyFrom(numpy_helper.from_array(weights, kernel.name))
    onnx.save(model, version / "model.onnx")
    rehash(version, "model.onnx")


def test_equal_answers_pass(logits):
    labels = logits.argmax(1)
    found = compare(logits, logits + np.float32(2**-16), CPU, labels)
    assert found.passed
    assert found.max_abs == pytest.approx(2**-16, rel=0.1)
    assert (found.top1_agreement, found.accuracy, found.n) == (1.0, 1.0, 200)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_fails(logits, value):
    candidate = logits.copy()
    candidate[17, 3] = value
    found = compare(logits, candidate, CPU)
    assert "the worst in image 17, class 3" in found.failures[0]
    assert found.worst == 17


def test_one_wrong_logit_fails_and_is_named(logits):
    candidate = logits.copy()
    candidate[5, 2] += 1e-3
    found = compare(logits, candidate, CPU)
    assert "1 of 2000 logits are off, the worst in image 5, class 2" in found.failures[0]


def test_the_tolerance_is_relative_to_the_reference():
    """Of |candidate - reference| <= atol + rtol * |reference| the reference must be the one that is trusted."""
    small, large = np.zeros((1, 2), np.float32), np.full((1, 2), 1e4, np.float32)
    assert not compare(small, large, CPU).passed
    assert not compare(large, small, CPU).passed


def test_other_classes_fail_but_not_among_ties():
    reference = np.array([[1.0, 2.0, 0.0]], np.float32)
    assert any("top-1" in f for f in compare(reference, reference[:, [1, 0, 2]], CPU).failures)
    tied = np.array([[1.0, 1.0 + 5e-5, 0.0]], np.float32)
    assert compare(tied, tied[:, [1, 0, 2]], CPU).passed


def test_another_accuracy_fails(logits):
    candidate = logits[:, ::-1].copy()
    failures = compare(logits, candidate, CPU, logits.argmax(1)).failures
    assert any("accuracy differs by" in failure for failure in failures)


def test_another_shape_or_nothing_fails(logits):
    assert compare(logits, logits[:, :9], CPU).failures == ("shape [200, 9], want [200, 10]",)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(logits[:0], logits[:0], CPU)


def test_probabilities_are_compared_too(logits):
    right = {"logits": logits, "probabilities": softmax(logits)}
    assert compare_outputs(logits, right, CPU).passed
    flat = {"logits": logits, "probabilities": np.full_like(logits, 0.1)}
    found = compare_outputs(logits, flat, CPU)
    assert found.failures
    assert all(failure.startswith("probabilities: ") for failure in found.failures)


def test_softmax_is_torchs(logits):
    np.testing.assert_allclose(softmax(logits * 20), torch.tensor(logits * 20).softmax(1).numpy(), atol=1e-6)


def test_every_tolerance_has_its_reason():
    assert all(len(row.reason) > 20 for row in TOLERANCES.values())
    assert tolerance("fp32", "cuda:3") is TOLERANCES["fp32", "cuda"]
    page = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")
    told = [line for line in page.splitlines() if re.match(r"\| (\w+) \| ([\w-]+) \| [\d.n]", line)]
    assert told == [
        f"| {precision} | {on} | {'none' if row.atol is None else f'{row.atol:g}'} |"
        f"{'' if row.atol is None else f' {row.rtol:g}'} | {100 * row.top1_agreement:.2f} % | {row.accuracy_pp:g} pp |"
        f" {row.reason} |"
        for (precision, on), row in TOLERANCES.items()
    ]


def test_every_file_of_a_bundle_passes(bundle, sample):
    seen = []
    report = parity.check(bundle, sample[1], "cpu", largest_batch=50, on_images=lambda *done: seen.append(done))
    assert report.passed
    assert report.images == 150 + 18
    covered = {(row.file, row.batch_size) for row in report.rows}
    assert covered == {(GOLDEN, 50), (MANIFEST, 200)} | {
        (f, n) for f in ("model.onnx", "model.pt") for n in (1, 3, 7, 50)
    }
    assert {row.provider for row in report.rows} == {"torch", "CPUExecutionProvider"}
    assert all(row.comparison.accuracy in (None, report.reference_accuracy) for row in report.rows)
    assert sum(count for count, _ in seen) == 2 * 4 * report.images
    assert {total for _, total in seen} == {2 * 4 * report.images}
    assert all(sum(row.differences) == 10 * report.images for row in report.rows if row.backend != "eager")
    assert report.document()["passed"] is True


@pytest.mark.parametrize("factor", [1.01, -1])
def test_one_changed_weight_fails(tampered, sample, factor):
    version = tampered / MODEL / "1"
    change_weight(version, factor)
    report = parity.check(open_bundle(version), sample[1], "cpu", largest_batch=50)
    failed = {row.file for row in report.rows if not row.comparison.passed}
    assert failed == {"model.onnx"}
    assert report.document()["passed"] is False


def test_stale_golden_answers_fail(tampered, sample):
    version = tampered / MODEL / "1"
    image, logits = open_bundle(version).golden()
    np.savez(version / GOLDEN, image=image, logits=logits + np.float32(0.01))
    rehash(version, GOLDEN)
    report = parity.check(open_bundle(version), sample[1], "cpu", largest_batch=50)
    ((row, text),) = matrix.failures(report, LABELS)
    assert row.file == GOLDEN
    assert "golden.npz was changed, or is of other weights: restore it, or export the model again" in text


def test_a_claimed_accuracy_that_is_not_the_weights_fails(tampered, sample):
    version = tampered / MODEL / "1"
    edit_manifest(version, test_accuracy={"value": 0.95, "n": 150})
    report = parity.check(open_bundle(version), sample[1], "cpu", largest_batch=50)
    ((_, text),) = matrix.failures(report, LABELS)
    assert text.startswith("the manifest claims an accuracy of 95.0000%, its weights have")
    assert text.endswith("manifest.json was changed, or is of other weights: restore it, or export the model again")


def test_a_reference_that_is_no_number_fails(logits):
    reference = logits.copy()
    reference[3, 3] = np.nan
    assert "the reference itself" in compare(reference, logits, CPU).failures[0]


@pytest.mark.gpu
def test_every_file_passes_on_cuda(bundle, sample):
    report = parity.check(bundle, sample[1], "all", largest_batch=50)
    assert report.passed
    assert {row.device for row in report.rows if row.backend != "eager"} >= {"cpu", "cuda:0"}


def test_a_weights_file_that_is_none_is_refused_without_torchs_advice_to_load_it_unsafely(tampered):
    version = tampered / MODEL / "1"
    (version / "weights.pt").write_bytes(b"no weights")
    rehash(version, "weights.pt")
    with pytest.raises(BundleError, match=r"weights\.pt holds no weights; export the model again") as raised:
        parity.reference(open_bundle(version))
    assert "weights_only" not in str(raised.value)
