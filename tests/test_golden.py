"""A real server's gate: what does not answer like the trained model is refused, or by `--golden warn` told of."""

import logging
import re
import shutil
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from conftest import MODEL, edit_manifest, rehash, running
from onnx import numpy_helper
from test_server import flip_byte, health, reverse_labels_everywhere, stale_golden
from test_triton_client import tensor
from test_versions import GREY
from tritonclient.grpc import InferenceServerClient

from protos import open_inference as pb
from serving.__main__ import main
from serving.bundle import LABELS, MANIFEST, ONNX, open_bundle
from serving.client import Client
from serving.errors import BundleError, StartupError
from serving.metrics import render
from trainer import parity

MNIST_MEAN = np.float32(33.3184)
FORMAT_1 = Path(__file__).parent / "data" / "format-1"


def change_initializers(version, change):
    """Put `change(name, array)` in place of the ONNX file's float arrays, and hide it from the hashes."""
    model = onnx.load(version / ONNX)
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer)
        if array.dtype == np.float32:
            changed = np.ascontiguousarray(change(initializer.name, array), np.float32)
            initializer.CopyFrom(numpy_helper.from_array(changed, initializer.name))
    onnx.save(model, version / ONNX)
    rehash(version, ONNX)


def perturb_weights(version):
    rng = np.random.default_rng(0)
    change_initializers(version, lambda name, array: array * (1 + 1e-3 * rng.choice([-1, 1], array.shape)))


def transpose_kernels(version):
    change_initializers(version, lambda name, array: array.swapaxes(2, 3) if array.ndim == 4 else array)


def wrong_normalisation(version):
    change_initializers(version, lambda name, array: MNIST_MEAN if name == "network.mean" else array)


def swap_labels(version, *, everywhere=True):
    """Two of them, in the manifest and, where `everywhere`, in labels.txt."""
    labels = list(open_bundle(version).manifest.labels)
    labels[2], labels[6] = labels[6], labels[2]
    edit_manifest(version, labels=labels)
    if everywhere:
        (version / LABELS).write_text("".join(f"{label}\n" for label in labels))
        rehash(version, LABELS)


def swap_labels_in_the_manifest(version):
    swap_labels(version, everywhere=False)


def edit_the_manifest(version):
    text = (version / MANIFEST).read_text()
    (version / MANIFEST).write_text(text.replace('"dataset": "fashion-mnist"', '"dataset": "mnist"'))


WRONG_ANSWERS = (
    r"the answers on cpu \(CPUExecutionProvider\) are not the trained model's, model\.onnx in a batch of 1: "
)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (perturb_weights, WRONG_ANSWERS),
        (transpose_kernels, WRONG_ANSWERS),
        (wrong_normalisation, WRONG_ANSWERS),
        (stale_golden, WRONG_ANSWERS),
        (swap_labels_in_the_manifest, r"its labels are not those of labels\.txt, .*; "),
        (swap_labels, r"model\.onnx's labels are .*, not the manifest's; "),
        (edit_the_manifest, r"the manifest was edited or damaged: restore it, or "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_version_beside_a_good_one_is_never_ready_and_says_what_to_do(tampered, caplog, damage, reason):
    shutil.copytree(tampered / MODEL / "1", tampered / MODEL / "2")
    edit_manifest(tampered / MODEL / "2", version=2)
    damage(tampered / MODEL / "2")
    with running(tampered, version_policy="all") as server, InferenceServerClient(server.address) as client:
        assert not client.is_model_ready(MODEL, "2")
        assert client.is_model_ready(MODEL, "1")
        assert not client.is_server_ready()
        assert not server.server.repository.ready()
        good, bad = client.get_model_repository_index().models
    assert (good.state, good.reason, bad.version, bad.state) == ("READY", "", "2", "UNAVAILABLE")
    assert re.search(reason + ".*export the model again$", bad.reason)
    (logged,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert logged == f"model {MODEL} version 2 is not served: {bad.reason}"


# --- warn


def test_warn_serves_what_differs_and_says_so_everywhere(tampered, caplog, capsys):
    transpose_kernels(tampered / MODEL / "1")
    caplog.set_level(logging.INFO)
    with (
        running(tampered, golden="warn") as server,
        Client(server.address) as client,
        InferenceServerClient(server.address) as triton,
        grpc.insecure_channel(server.address) as channel,
    ):
        assert triton.is_server_ready()
        assert len(client.predict(GREY).predictions) == 1
        triton.infer(MODEL, [tensor("image", GREY, "UINT8")])
        (model,) = client.list_models()
        (index,) = triton.get_model_repository_index().models
        about = triton.get_model_config(MODEL).config.parameters
        metadata = channel.unary_unary(pb.RPCS["ModelMetadata"].path)
        properties = metadata(pb.ModelMetadataRequest(name=MODEL).SerializeToString())
        metrics = render(server.server.snapshot())[0].decode()
        assert main(["models", "--server", server.address]) == 0
    doubt = model.reason
    assert doubt.startswith("the answers on cpu (CPUExecutionProvider) are not the trained model's, model.onnx ")
    assert all(f"in a batch of {size}: logits: " in doubt for size in (1, 3, 50))
    assert "top-1 agreement" in doubt
    assert (model.state, model.verified, len(model.labels)) == ("READY", False, 10)
    assert model.golden_max_abs > 0.1
    assert (index.state, index.reason) == ("READY", doubt)
    assert (about["verified"].string_value, about["reason"].string_value) == ("false", doubt)
    assert float(about["golden_max_abs"].string_value) == pytest.approx(model.golden_max_abs, rel=0.01)
    told = pb.ModelMetadataResponse.FromString(properties).properties
    assert {key: told[key] for key in ("verified", "reason", "golden_max_abs")} == {
        key: about[key].string_value for key in ("verified", "reason", "golden_max_abs")
    }
    assert 'device="cpu",model="fashion-mnist",provider="CPUExecutionProvider",verified="false"' in metrics
    assert f'parityserve_golden_max_abs{{model="{MODEL}",version="1"}} {model.golden_max_abs}' in metrics
    *table, reason = capsys.readouterr().out.splitlines()
    assert any(line.endswith("│ unverified │") for line in table)
    assert reason == f"{MODEL} version 1: {doubt}"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"model {MODEL} version 1 is served all the same, by --golden warn: ")
    assert warning.endswith(doubt)
    assert re.search(rf"model {MODEL} version 1 READY: .*; UNVERIFIED; ", caplog.text)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_byte, r"model\.onnx: sha256 is"),
        (edit_the_manifest, "the manifest was edited"),
        (reverse_labels_everywhere, r"model\.onnx's labels are"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_warn_lets_nothing_else_pass(tampered, damage, reason):
    damage(tampered / MODEL / "1")
    with pytest.raises(StartupError, match=reason), running(tampered, golden="warn"):
        pass


def test_warn_changes_nothing_for_a_version_that_passes(repository, caplog):
    with running(repository, golden="warn") as server, Client(server.address) as client:
        (model,) = client.list_models()
    assert (model.verified, model.reason) == (True, "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- older and newer formats


@pytest.fixture(scope="module")
def frozen():
    """A version that format 1's exporter wrote; nothing here may need to change for it."""
    return open_bundle(FORMAT_1 / MODEL / "1")


def test_a_version_of_format_1_still_loads_verifies_and_passes_parity(frozen, sample):
    assert frozen.manifest.format_version == 1
    frozen.verify()
    report = parity.check(frozen, sample[1], "cpu", largest_batch=50)
    assert report.passed
    assert {row.file for row in report.rows} >= {"model.onnx", "model.pt", "golden.npz"}
    assert sum(path.stat().st_size for path in frozen.path.iterdir()) < 100_000


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
def test_a_version_of_format_1_is_served(frozen, backend):
    image, logits = frozen.golden()
    with running(FORMAT_1, backend=backend) as server, Client(server.address) as client:
        assert health(server.address) == 1
        (model,) = client.list_models()
        result = client.predict(image)
    assert (model.state, model.verified, model.backend) == ("READY", True, backend)
    assert [prediction.class_id for prediction in result.predictions] == logits.argmax(1).tolist()


@pytest.mark.parametrize("later", [3, "2"])
def test_a_version_of_a_later_format_says_to_update(tampered, later):
    edit_manifest(tampered / MODEL / "1", format_version=later)
    text = f"format_version is {later}, this parityserve reads 1 or 2; update parityserve, or export"
    with pytest.raises(BundleError, match=text):
        open_bundle(tampered / MODEL / "1")
