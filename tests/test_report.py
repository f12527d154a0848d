"""The model card and the figures behind it, against computations of another kind."""

import json
import math
import re
import shlex

import numpy as np
import onnxruntime
import pytest
from conftest import MODEL, edit_manifest, running

import serving.__main__
import trainer.__main__
from serving import bundle as bundles
from serving.bundle import CARD, HISTORY, MANIFEST, open_bundle
from serving.client import Client
from serving.config import ServerConfig
from serving.options import parse
from trainer import scores
from trainer.export import export
from trainer.report import model_card


@pytest.fixture
def answers():
    """Probabilities float32 [400, 5] and true classes [400]; the fifth class is never true, the fourth never named."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 400)
    logits = random.normal(0, 1, (400, 5))
    logits[np.arange(400), labels] += 2
    logits[:, 3] = -9
    odds = np.exp(logits)
    return (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32), labels


# --- scores


@pytest.mark.parametrize(("right", "n"), [(9931, 10_000), (1, 3), (75, 150), (0, 10), (10, 10)])
def test_the_interval_ends_where_the_score_test_just_rejects(right, n):
    """Wilson's definition: the proportions p whose distance from what was seen is z standard errors of p itself."""
    low, high = scores.wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    for end in (low, high):
        distance = abs(right / n - end)
        assert distance == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-7)
    assert low < high


def test_intervals_as_published():
    """Newcombe, Statistics in Medicine 17 (1998), table I: method 3."""
    for (right, n), want in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert scores.wilson(right, n) == pytest.approx(want, abs=5e-5)


@pytest.mark.parametrize(("right", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_an_interval_of_no_proportion_is_refused(right, n):
    with pytest.raises(ValueError, match=f"got {right} right of {n}"):
        scores.wilson(right, n)


def test_confusion_and_scores_by_class_as_counted_one_by_one(answers):
    probabilities, labels = answers
    said = probabilities.argmax(axis=1)
    confusion = scores.confusion_matrix(labels, said, 5)
    for true in range(5):
        for called in range(5):
            assert confusion[true, called] == sum(
                1 for a, b in zip(labels, said, strict=True) if (a, b) == (true, called)
            )
    for index, found in enumerate(scores.class_scores(confusion)):
        hits = sum(1 for a, b in zip(labels, said, strict=True) if a == b == index)
        called, support = list(said).count(index), list(labels).count(index)
        assert found.support == support
        assert found.precision == pytest.approx(hits / called if called else 0)
        assert found.recall == pytest.approx(hits / support if support else 0)
        both = found.precision + found.recall
        assert found.f1 == pytest.approx(2 * found.precision * found.recall / both if both else 0)
    assert [found.support == 0 for found in scores.class_scores(confusion)] == [False] * 4 + [True]


def test_calibration_as_counted_one_by_one(answers):
    probabilities, labels = answers
    found = scores.calibration(probabilities, labels, bins=10)
    error = 0.0
    for index in range(10):
        inside = [
            (float(row.max()), int(row.argmax()) == label)
            for row, label in zip(probabilities, labels, strict=True)
            if index / 10 <= row.max() < (index + 1) / 10
        ]
        assert found.counts[index] == len(inside)
        if not inside:
            assert np.isnan(found.accuracy[index])
            assert np.isnan(found.confidence[index])
            continue
        confidence = sum(sure for sure, _ in inside) / len(inside)
        accuracy = sum(right for _, right in inside) / len(inside)
        assert found.confidence[index] == pytest.approx(confidence)
        assert found.accuracy[index] == pytest.approx(accuracy)
        error += len(inside) / len(labels) * abs(accuracy - confidence)
    assert found.error == pytest.approx(error)
    assert found.error > 0.01


def test_the_error_of_calibration_is_none_for_one_who_is_sure_and_right_and_all_for_one_who_is_sure_and_wrong():
    sure = np.eye(3, dtype=np.float32)[[0, 1, 2, 2]]
    assert scores.calibration(sure, np.array([0, 1, 2, 2])).error == 0
    assert scores.calibration(sure, np.array([1, 2, 0, 0])).error == 1
    assert scores.calibration(sure, np.array([0, 1, 2, 2])).counts.tolist() == [0] * 14 + [4]


# --- the card


@pytest.fixture
def card(bundle):
    return bundle.read(CARD).decode()


def table(card: str, section: str) -> list[list[str]]:
    """The rows of a section's first Markdown table, without its head."""
    text = card.partition(f"\n## {section}\n")[2].partition("\n## ")[0] if section else card
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_accuracy_and_confusion_are_those_of_the_exported_file(bundle, sample, card):
    """Answered again by ONNX Runtime, counted without numpy."""
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    said = session.run(["logits"], {"image": sample[1].images.numpy()})[0].argmax(axis=1).tolist()
    pairs = list(zip(sample[1].labels.tolist(), said, strict=True))
    right = sum(true == called for true, called in pairs)
    summary = dict(table(card, "")[:7])
    assert summary["test accuracy"].startswith(f"{right / 150:.2%} of 150 images, 95 % confidence interval ")
    low, high = (float(end) / 100 for end in re.findall(r"([\d.]+)%", summary["test accuracy"])[1:])
    assert (low, high) == pytest.approx(scores.wilson(right, 150), abs=5e-5)

    (block,) = re.findall(r"^```text\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    head, *lines = block.splitlines()
    assert head.split() == [str(index) for index in range(10)]
    for true, line in enumerate(lines):
        assert line.startswith(f"{true} {bundle.manifest.labels[true]} ")
        counts = [0 if cell == "." else int(cell) for cell in line.split()[-10:]]
        assert counts == [pairs.count((true, called)) for called in range(10)]

    rows = table(card, "Accuracy by class")
    assert [row[0] for row in rows] == list(bundle.manifest.labels)
    for index, (_, precision, recall, f1, support) in enumerate(rows):
        hits = pairs.count((index, index))
        called, of_class = said.count(index), sum(true == index for true, _ in pairs)
        assert int(support) == of_class
        assert recall == f"{hits / of_class:.2%}"
        assert precision == f"{hits / called if called else 0:.2%}"
        assert f1 == f"{2 * hits / (called + of_class):.2%}"


def test_the_card_tells_what_the_manifest_holds(bundle, card):
    manifest = bundle.manifest
    assert card.startswith(f"# {MODEL}, version 1\n")
    summary = dict(table(card, "")[:7])
    assert summary["network"] == "cnn, 225,034 parameters"
    assert summary["data set"].startswith("fashion-mnist: 10 classes (T-shirt/top, ")
    assert summary["made"].startswith(manifest.created)
    settings = dict(table(card, "Training"))
    assert settings == {
        f"`{name}`": value if isinstance(value, str) else json.dumps(value) for name, value in manifest.training.items()
    }
    parity = {row[0]: row[1:] for row in table(card, "Parity")}
    assert set(parity) == {"`golden.npz`", "`model.pt`", "`model.onnx`"}
    found = manifest.files["model.onnx"].parity
    assert parity["`model.onnx`"] == [
        "cpu",
        "168",
        "1, 3, 142, 1000",
        f"{found.max_abs:.1e}",
        f"{found.mean_abs:.1e}",
        "100.00%",
    ]


def test_the_cards_commands_are_accepted_and_serve_the_model(repository, sample, card):
    (block,) = re.findall(r"^```sh\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    chosen = []
    for line in block.splitlines():
        start, module, rest = re.split(r"-m (serving|trainer) ", line)
        assert start == "python "
        words = [word.replace("exported", str(repository)) for word in shlex.split(rest)]
        chosen.append({"trainer": trainer, "serving": serving}[module].__main__.parser().parse_args(words))
    serve, predict, parity, plots = chosen
    assert parity.bundle == plots.bundle == repository / MODEL / "1"
    assert predict.model == MODEL
    config = parse(ServerConfig, serve)
    with running(config.repository, models=config.models) as server, Client(server.address) as client:
        assert client.predict(sample[1].images[:1].numpy(), predict.model).version == "1"


def test_a_card_is_of_its_own_version_and_covered_by_its_manifest(checkpoint, sample, tampered):
    second, _ = export(checkpoint, sample[1], tampered)
    assert second.read(CARD).startswith(f"# {MODEL}, version 2\n".encode())
    (second.path / CARD).write_text("# The best model of all\n", encoding="utf-8")
    with pytest.raises(bundles.BundleError, match=r"README\.md: sha256 is"):
        open_bundle(second.path).verify()


def test_the_history_goes_with_the_version(bundle, checkpoint):
    assert json.loads(bundle.read(HISTORY)) == checkpoint.history
    assert len(checkpoint.history) == 4


def test_a_version_from_before_there_were_cards_is_served(tampered, sample):
    version = tampered / MODEL / "1"
    files = json.loads((version / MANIFEST).read_text())["files"]
    for name in (CARD, HISTORY):
        (version / name).unlink()
        del files[name]
    edit_manifest(version, files=files)
    with running(tampered) as server, Client(server.address) as client:
        assert client.predict(sample[1].images[:1].numpy()).version == "1"


def test_labels_that_are_the_classes_numbers_stand_once_and_bars_do_not_break_tables(bundle, answers):
    probabilities, labels = answers
    confusion = scores.confusion_matrix(labels, probabilities.argmax(axis=1), 5)
    calibration = scores.calibration(probabilities, labels)
    digits = bundle.manifest.model_copy(update={"labels": ("0", "1", "2", "3", "4")})
    assert re.search(r"^0 +\d+", model_card(digits, confusion, calibration), re.MULTILINE)
    bars = bundle.manifest.model_copy(update={"labels": ("a|b", "1", "2", "3", "4")})
    assert table(model_card(bars, confusion, calibration), "Accuracy by class")[0][0] == r"a\|b"
