"""`trainer parity` and `trainer diff`: what they catch, where, and how they say it."""

import json
import shutil
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
import torch
from conftest import MODEL, edit_manifest, rehash, running
from onnx import numpy_helper
from test_parity import LABELS, change_weight

import trainer.__main__
from serving.backends.torchscript import save_traced
from serving.bundle import MANIFEST, open_bundle
from serving.errors import BundleError, DeviceError, NotFound, Unavailable
from serving.remote import RemoteBackend
from trainer import bisect, diff, matrix, parity
from trainer.artefacts import OPSET
from trainer.models import Deployed


def edit_initializer(version, name, change, file="model.onnx"):
    """Change a constant of an ONNX file, and hide it from the hash; `change` gives the new array of the old one."""
    model = onnx.load(version / file)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    changed = np.ascontiguousarray(change(numpy_helper.to_array(tensor)))
    tensor.CopyFrom(numpy_helper.from_array(changed, name))
    onnx.save(model, version / file)
    rehash(version, file)


def shaken(array):
    signs = np.random.default_rng(0).choice([-1, 1], array.shape)
    return (array * (1 + 1e-3 * signs)).astype(array.dtype)


def shake_onnx(version):
    for tensor in onnx.load(version / "model.onnx").graph.initializer:
        if tensor.name.endswith(".weight"):
            edit_initializer(version, tensor.name, shaken)


def shake_torchscript(version):
    network = parity.reference(open_bundle(version))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.from_numpy(shaken(parameter.numpy())))
    save_traced(Deployed(network).eval(), torch.zeros(2, 1, 28, 28, dtype=torch.uint8), version / "model.pt")
    rehash(version, "model.pt")


def transpose_a_kernel(version):
    edit_initializer(version, "network.features.0.weight", lambda kernel: kernel.swapaxes(2, 3))


def normalise_wrongly(version):
    edit_initializer(version, "network.std", lambda std: std * np.float32(1.01))


def swap_two_labels(version):
    labels = [*LABELS[1:2], *LABELS[:1], *LABELS[2:]]
    (version / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
    edit_manifest(version, labels=labels)
    rehash(version, "labels.txt")


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (shake_onnx, {"model.onnx"}),
        (shake_torchscript, {"model.pt"}),
        (transpose_a_kernel, {"model.onnx"}),
        (normalise_wrongly, {"model.onnx"}),
        (swap_two_labels, {MANIFEST, "model.onnx"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_was_changed_is_caught_and_said(tampered, sample, change, failing):
    version = tampered / MODEL / "1"
    change(version)
    report = parity.check(open_bundle(version), sample[1], "cpu", largest_batch=50)
    texts = list(matrix.failures(report, LABELS))
    assert {row.file for row, _ in texts} == failing
    for file in failing:
        assert any(
            "What to do: " in text and "export the model again" in text for row, text in texts if row.file == file
        )


def test_a_manifest_edited_by_hand_is_caught(tampered, capsys):
    path = tampered / MODEL / "1" / MANIFEST
    path.write_text(path.read_text().replace('"version": 1', '"version":  1'))
    assert trainer.__main__.main(["parity", "--bundle", str(path.parent)]) == 1
    assert "the manifest was edited or damaged: restore it, or export the model again" in capsys.readouterr().err


def test_the_worst_image_is_shown_with_both_answers(tampered, sample):
    version = tampered / MODEL / "1"
    change_weight(version, -1)
    report = parity.check(open_bundle(version), sample[1], "cpu", largest_batch=50)
    row, text = next(matrix.failures(report, LABELS))
    index = row.worst.index
    off = np.abs(np.subtract(row.worst.candidate, row.worst.reference)).max()
    assert off == pytest.approx(row.comparison.max_abs, rel=1e-3)
    wanted = parity.predict(parity.reference(open_bundle(version)), sample[1].images[index : index + 1])[0]
    np.testing.assert_allclose(row.worst.reference, wanted.numpy(), atol=1e-4)
    label = int(sample[1].labels[index])
    assert f"worst image: test image {index}, a {LABELS[label]} (class {label})" in text
    assert sum(line.startswith(("  PyTorch", "  candidate")) for line in text.splitlines()) == 2


def test_a_file_that_does_not_open_is_a_row(tampered, sample):
    version = tampered / MODEL / "1"
    (version / "model.onnx").write_bytes(b"damaged")
    report = parity.check(open_bundle(version), sample[1], "cpu", largest_batch=50)
    (failed,) = [row for row in report.rows if not row.comparison.passed]
    assert "model.onnx: sha256 is" in failed.comparison.failures[0]
    assert {row.batch_size for row in report.rows if row.file == "model.pt"} == {1, 3, 7, 50}
    document = json.dumps(report.document(), allow_nan=False)  # infinity is no JSON
    assert json.loads(document)["rows"][2]["comparison"]["max_abs"] is None


def test_a_device_that_does_not_run_is_left_out_only_of_all(bundle, sample, monkeypatch, tmp_path):
    """The ninth GPU is one that no machine of ours has."""
    monkeypatch.setattr(parity, "devices", lambda spec: ("cpu", "cuda:8") if spec == "all" else (spec,))
    report = parity.check(bundle, sample[1], "all", largest_batch=1)
    assert report.passed
    assert {row.device for row in report.rows} == {"cpu"}
    assert [text.partition(": ")[0] for text in report.left_out] == ["model.onnx on cuda:8", "model.pt on cuda:8"]
    matrix.write_junit(report, LABELS, tmp_path / "junit.xml")
    assert len(ElementTree.parse(tmp_path / "junit.xml").findall(".//skipped")) == 2
    with pytest.raises(DeviceError):
        parity.check(bundle, sample[1], "cuda:8", largest_batch=1)


def test_a_server_is_compared_by_what_it_runs(full_repository, sample):
    bundle = open_bundle(full_repository / MODEL / "1")
    with running(full_repository, precision="int8", max_batch_size=20) as server:
        with RemoteBackend(server.address, MODEL, "1") as remote:
            assert (remote.name, remote.file, remote.device) == ("onnx", "model.int8.onnx", "cpu")
            report = parity.check(bundle, sample[1], "cpu", 20, remote=remote)
        rows = [row for row in report.rows if row.server]
        with pytest.raises(NotFound, match=r"does not serve fashion-mnist version 7: .*--version-policy specific:7"):
            RemoteBackend(server.address, MODEL, "7")
    here = [row for row in report.rows if row.file == "model.int8.onnx" and not row.server]
    assert report.passed
    assert {row.where for row in rows} == {f"server {server.address}"}
    assert [(row.precision, row.batch_size) for row in rows] == [("int8", size) for size in (1, 2, 3, 20)]
    assert [row.comparison for row in rows] == [row.comparison for row in here]
    with pytest.raises(Unavailable, match=r"no server answers .*start one with python -m serving serve"):
        RemoteBackend(server.address, MODEL, "1")


def test_a_server_with_a_file_that_the_bundle_has_not_is_refused(full_repository, bundle, sample):
    with (
        running(full_repository, backend="pt2") as server,
        RemoteBackend(server.address, MODEL, "1") as remote,
        pytest.raises(BundleError, match=r"runs model\.pt2 with pt2, which .* does not have: .*; name the folder"),
    ):
        parity.check(bundle, sample[1], "cpu", 3, remote=remote)


@pytest.mark.parametrize("file", ["model.onnx", "model.fp16.onnx", "model.int8.onnx"])
def test_every_layer_of_a_whole_file_agrees(full_repository, sample, file):
    bundle = open_bundle(full_repository / MODEL / "1")
    found = bisect.layers(bundle, file, sample[1].images[:20].numpy())
    assert bisect.first_failing(found) is None
    names = [layer.name for layer in found]
    assert names[0] == ("features.0" if "int8" in file else "normalise")  # int8 has that in its first convolution
    assert names[-1] == "logits"
    weighted = [(layer.name, layer.kind) for layer in found if layer.kind in ("Conv2d", "Linear")]
    assert weighted[:3] == [("features.0", "Conv2d"), ("features.3", "Conv2d"), ("classifier.1", "Linear")]
    assert all(layer.comparison.n == 20 for layer in found)


@pytest.mark.parametrize(
    ("file", "constant", "layer"),
    [
        ("model.onnx", "network.std", "normalise"),
        ("model.onnx", "network.features.3.bias", "features.3"),
        ("model.fp16.onnx", "network.classifier.1.bias", "classifier.1"),
        ("model.int8.onnx", "network.features.0.weight_whole", "features.0"),
        ("model.int8.onnx", "network.features.3.weight_scale", "features.3"),
    ],
)
def test_the_first_layer_that_departs_is_named(full_repository, sample, tmp_path, file, constant, layer):
    shutil.copytree(full_repository, tmp_path / "exported")
    version = tmp_path / "exported" / MODEL / "1"
    edit_initializer(version, constant, lambda array: (array * 3 + 1).astype(array.dtype), file)
    found = bisect.layers(open_bundle(version), file, sample[1].images[:20].numpy())
    assert bisect.first_failing(found).name == layer
    assert f"{file} departs from PyTorch first at {layer}" in bisect.summary(file, found)


def test_layers_are_told_by_their_weights_where_the_exporters_notes_are_lost(tampered, sample):
    version = tampered / MODEL / "1"
    model = onnx.load(version / "model.onnx")
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, version / "model.onnx")
    rehash(version, "model.onnx")
    found = bisect.layers(open_bundle(version), "model.onnx", sample[1].images[:5].numpy())
    assert [layer.name for layer in found] == [
        *("normalise", "features.0", "features.3", "classifier.1", "logits"),
    ]
    assert bisect.first_failing(found) is None


def test_a_folded_batch_norm_is_the_layer_that_is_compared(tmp_path):
    """The exporter folds it into the convolution before it, whose own output then is nowhere in the file."""
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU())
    modules = {f"features.{name}": module for name, module in network.named_modules()}
    node = onnx.helper.make_node("Conv", ["x", "network.features.0.weight", "network.features.0.bias"], ["y"])
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [], []), opset_imports=[onnx.helper.make_opsetid("", OPSET)]
    )
    assert bisect._layer(model.graph.node[0], modules) == "features.1"


def test_the_command_writes_every_report(tampered, served, small_data, tmp_path, monkeypatch, capsys):
    """The server has the version as it was exported, the folder one with a changed weight: only that fails."""
    monkeypatch.chdir(tmp_path)
    change_weight(tampered / MODEL / "1", -1)
    words = ["parity", "--bundle", tampered / MODEL, "--device", "cpu", "--server", served, "--bisect"]
    reports = ["--json", "out/r.json", "--junit", "out/j.xml", "--picture", "out/p.png"]
    assert trainer.__main__.main([*map(str, words), *reports]) == 1
    printed = capsys.readouterr().out
    assert "FAILED model.onnx, CPU on cpu, batch 1: logits: " in printed
    assert "model.onnx departs from PyTorch first at features.3, a Conv2d (node " in printed
    rows = json.loads((tmp_path / "out/r.json").read_text())["rows"]
    assert {row["file"] for row in rows if not row["passed"]} == {"model.onnx"}
    assert {row["server"] for row in rows if row["passed"]} == {"", served}
    suite = ElementTree.parse(tmp_path / "out/j.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == (str(len(rows)), "4")
    assert len(suite.findall("testcase")) == len(rows)
    assert "worst image: " in suite.find(".//failure").text
    assert (tmp_path / "out/p.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def other(tampered):
    """Version 1 again, with one weight of the reference's last layer changed, so that answers differ."""
    version = tampered / MODEL / "1"
    weights = torch.load(version / "weights.pt", weights_only=True)
    weights["classifier.3.bias"][6] += 1.0  # more is called a shirt
    torch.save(weights, version / "weights.pt")
    rehash(version, "weights.pt")
    return open_bundle(version)


def test_two_versions_are_compared(bundle, other, sample):
    found = diff.compare_versions(bundle, other, sample[1])
    answers = [parity.predict(parity.reference(each), sample[1].images).argmax(1) for each in (bundle, other)]
    right = [each == sample[1].labels for each in answers]
    assert (found.a.right, found.b.right) == (int(right[0].sum()), int(right[1].sum()))
    assert [flip.index for flip in found.lost] == torch.nonzero(right[0] & ~right[1]).flatten().tolist()
    assert [flip.index for flip in found.gained] == torch.nonzero(right[1] & ~right[0]).flatten().tolist()
    assert found.lost
    assert all((flip.answer_a, flip.answer_b) == (flip.label, 6) for flip in found.lost)
    assert found.agreement == pytest.approx((answers[0] == answers[1]).float().mean().item())
    assert sum(row.right_b - row.right_a for row in found.classes) == found.b.right - found.a.right
    assert found.a.low < found.a.accuracy < found.a.high
    same = diff.compare_versions(bundle, bundle, sample[1])
    assert (same.agreement, same.lost, same.gained, same.p_value) == (1.0, (), (), 1.0)


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (10, 1, 24 / 2048)])
def test_mcnemars_exact_test(lost, gained, p):
    """Twice the smaller tail of a binomial distribution with one half: (1 + 11) / 2048 * 2 for 1 of 11."""
    assert diff.mcnemar(lost, gained) == pytest.approx(p)


def test_the_diff_command(bundle, other, small_data, tmp_path, capsys):
    report, picture = tmp_path / "out" / "d.json", tmp_path / "out" / "d.png"
    words = ["diff", bundle.path, other.path, "--json", report, "--picture", picture]
    assert trainer.__main__.main(list(map(str, words))) == 0
    printed = capsys.readouterr().out
    document = json.loads(report.read_text())
    assert f"right in A, wrong in B: {len(document['lost'])} images" in printed
    assert document["verdict"] in printed.replace("\n", " ")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_versions_of_two_data_sets_are_not_compared(bundle, other, capsys):
    edit_manifest(other.path, dataset="mnist")
    assert trainer.__main__.main(["diff", str(bundle.path), str(other.path)]) == 2
    edit_manifest(other.path, dataset="cifar")
    assert trainer.__main__.main(["parity", "--bundle", str(other.path)]) == 1
    errors = capsys.readouterr().err
    assert "only versions of one data set can be compared" in errors
    assert "its data set is 'cifar', want one of mnist, fashion-mnist" in errors
