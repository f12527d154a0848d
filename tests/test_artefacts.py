"""Every kind of file that a version can have: what is written, and that it is portable and answers alike."""

import shutil

import numpy as np
import onnx
import onnxruntime as ort
import openvino
import pytest
import torch
from conftest import MODEL, rehash, running
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from serving.backends import open_backend
from serving.bundle import ARTEFACTS, GOLDEN, open_bundle
from serving.client import Client
from serving.errors import BundleError, DeviceError, StartupError
from serving.parity import compare, compare_outputs, tolerance
from trainer import artefacts, data, parity, precisions
from trainer import checkpoint as checkpoints
from trainer.__main__ import main
from trainer.config import NetworkConfig
from trainer.export import export
from trainer.models import Deployed, Network
from trainer.precisions import calibration_images

WITHOUT_COMPILER = {pair: name for pair, name in ARTEFACTS.items() if pair[0] != "aoti"}


@pytest.fixture
def full(full_repository):
    return open_bundle(full_repository / MODEL / "1")


@pytest.fixture
def wanted(full):
    """Images uint8 [50, 1, 28, 28] and what eager PyTorch answers, float32 [50, 10]."""
    return full.golden()


def test_every_artefact_is_written_and_proved(full):
    assert full.manifest.artefacts() == {name: pair for pair, name in WITHOUT_COMPILER.items()}
    for name in WITHOUT_COMPILER.values():
        found = full.manifest.files[name].parity
        assert found.n == 150 + 18
        assert found.top1_agreement >= 0.97


def test_lower_precisions_are_smaller_and_not_the_same(full):
    size = {pair: full.manifest.files[name].size_bytes for pair, name in WITHOUT_COMPILER.items()}
    assert size["onnx", "fp16"] < 0.55 * size["onnx", "fp32"]
    assert size["onnx", "int8"] < 0.35 * size["onnx", "fp32"]
    errors = [full.manifest.files[ARTEFACTS["onnx", each]].parity.max_abs for each in ("fp32", "fp16", "int8")]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("pair", WITHOUT_COMPILER, ids=" ".join)
def test_every_artefact_is_served(full_repository, full, wanted, pair):
    backend, precision = pair
    with running(full_repository, backend=backend, precision=precision) as server, Client(server.address) as client:
        (model,) = client.list_models()
        assert (model.state, model.backend, model.verified) == ("READY", backend, True)
        result = client.predict(wanted[0], MODEL)
    classes = [prediction.class_id for prediction in result.predictions]
    agreement = (np.array(classes) == wanted[1].argmax(1)).mean()
    assert agreement >= tolerance(precision, "cpu", MODEL).top1_agreement - 1 / len(classes)


def test_auto_takes_int8_on_the_cpu_and_fp32_where_there_is_no_other(full, bundle):
    assert open_backend("onnx", full, "cpu", precision="auto").file == "model.int8.onnx"
    assert open_backend("torchscript", full, "cpu", precision="auto").file == "model.pt"
    assert open_backend("onnx", bundle, "cpu", precision="auto").file == "model.onnx"


def test_a_file_that_was_not_exported_is_named(bundle):
    with pytest.raises(BundleError, match="has no onnx int8 file, only: eager fp32, onnx fp32, torchscript fp32"):
        open_backend("onnx", bundle, "cpu", precision="int8")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_onnx_file_is_valid_and_portable(full, precision):
    model = onnx.load(full.path / ARTEFACTS["onnx", precision])
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == artefacts.OPSET
    assert {opset.domain for opset in model.opset_import} <= {""}
    assert model.ir_version <= 10
    assert "Shape" not in {node.op_type for node in model.graph.node}
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in (*model.graph.input, *model.graph.output)] == [
        "batch"
    ] * 3
    assert {entry.key for entry in model.metadata_props} >= {"labels", "dataset", "network"}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert {info.name for info in inferred.graph.value_info} >= {
        name for node in model.graph.node[:-1] for name in node.output if name != "logits"
    }


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_onnxs_reference_evaluator_answers_alike(full, wanted, precision):
    """An implementation that shares no code with ONNX Runtime."""
    image, logits = wanted
    session = ReferenceEvaluator(onnx.load(full.path / ARTEFACTS["onnx", precision]))
    outputs = dict(zip(session.output_names, session.run(None, {"image": image[:8]}), strict=True))
    assert compare_outputs(logits[:8], outputs, tolerance(precision, "cpu", MODEL)).failures == ()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_openvino_answers_alike(full, wanted, precision):
    image, logits = wanted
    compiled = openvino.Core().compile_model(
        full.path / ARTEFACTS["onnx", precision], "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    outputs = compiled({"image": image})
    answers = {name: outputs[name] for name in ("logits", "probabilities")}
    assert compare_outputs(logits, answers, tolerance(precision, "cpu", MODEL)).failures == ()


def test_torch_loads_the_pt2_file_without_us(full, wanted):
    image, logits = wanted
    answers, _ = torch.export.load(full.path / "model.pt2").module()(torch.from_numpy(image[:3]))
    assert compare(logits[:3], answers.detach().numpy(), tolerance("fp32", "cpu")).passed


def change_int8(version):
    """The sign of one channel's largest weight."""
    path = version / "model.int8.onnx"
    model = onnx.load(path)
    kernel = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [64, 32, 3, 3])
    steps = numpy_helper.to_array(kernel).copy()
    assert steps.dtype == np.int8
    steps[np.unravel_index(np.abs(steps.astype(int)).argmax(), steps.shape)] *= -1
    kernel.CopyFrom(numpy_helper.from_array(steps, kernel.name))
    onnx.save(model, path)
    rehash(version, path.name)


def stale_int8(version):
    """Answers that another int8 file gave."""
    with np.load(version / GOLDEN) as arrays:
        answers = dict(arrays)
    answers["model.int8.onnx"] = answers["model.int8.onnx"] + np.float32(0.01)
    np.savez(version / GOLDEN, **answers)
    rehash(version, GOLDEN)


@pytest.mark.parametrize("damage", [change_int8, stale_int8])
def test_an_int8_file_that_answers_otherwise_than_when_it_was_proved_is_refused(
    full_repository, sample, tmp_path, damage
):
    root = tmp_path / "exported"
    shutil.copytree(full_repository, root)
    damage(root / MODEL / "1")
    report = parity.check(open_bundle(root / MODEL / "1"), sample[1], "cpu", largest_batch=50)
    assert (GOLDEN, "int8") in [(row.file, row.precision) for row in report.rows if not row.comparison.passed]
    text = r"are not the trained model's, model\.int8\.onnx in a batch of .*; export the model again"
    with pytest.raises(StartupError, match=text), running(root, precision="int8"):
        pass


def test_an_int8_file_without_answers_of_its_own_is_refused(full_repository, tmp_path):
    root = tmp_path / "exported"
    shutil.copytree(full_repository, root)
    image, logits = open_bundle(root / MODEL / "1").golden()
    np.savez(root / MODEL / "1" / GOLDEN, image=image, logits=logits)
    rehash(root / MODEL / "1", GOLDEN)
    text = r"golden\.npz: not a golden file \('model\.int8\.onnx is not a file in the archive'\); export the model"
    with pytest.raises(StartupError, match=text), running(root, precision="int8"):
        pass


def test_calibration_images_are_as_many_of_each_class(sample):
    train = sample[0]
    images = calibration_images(train, 50)
    assert images.shape == (50, 1, 28, 28)
    places = [next(i for i in range(len(train)) if torch.equal(train.images[i], image)) for image in images]
    assert torch.bincount(train.labels[places]).tolist() == [5] * 10
    assert torch.equal(images, calibration_images(train, 50))


@pytest.mark.parametrize(
    ("formats", "precisions", "text"),
    [
        (["tflite"], ["fp32"], "--formats: got tflite, want some of onnx, torchscript, pt2, aoti"),
        (["onnx"], ["fp8"], "--precisions: got fp8, want some of fp32, fp16, int8"),
        ([], ["fp32"], "--formats: got nothing"),
        (["onnx", "torchscript"], ["int8"], "--formats torchscript: no file to write goes with the rest"),
        (["torchscript"], ["fp32", "fp16"], "--precisions fp16: no file to write goes with the rest"),
    ],
)
def test_what_does_not_go_together_is_an_error(formats, precisions, text):
    with pytest.raises(ValueError, match=text):
        artefacts.choose(formats, precisions)


def test_int8_alone_is_exported_without_the_file_it_was_made_from(checkpoint, sample, tmp_path):
    chosen = artefacts.choose(["onnx"], ["int8"])
    deployed = Deployed(checkpoint.build()).eval()
    artefacts.write(deployed, chosen, tmp_path, {}, sample[0].images)
    assert [path.name for path in tmp_path.iterdir()] == ["model.int8.onnx"]
    with pytest.raises(ValueError, match="int8 needs training images to calibrate with"):
        artefacts.write(deployed, chosen, tmp_path, {})


def answers(model, images):
    return ort.InferenceSession(model.SerializeToString()).run(["logits"], {"image": images})[0]


def test_the_first_convolution_of_int8_sums_whole_numbers_that_floats_are_exact_for(full):
    model = onnx.load(full.path / "model.int8.onnx")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    weight, bias = (constants[name] for name in conv.input[1:])
    for whole in (constants["whole_mean"], weight, bias):
        np.testing.assert_array_equal(whole, np.round(whole))
    most = 255 * np.abs(weight).sum(axis=(1, 2, 3)) + np.abs(bias)
    assert 2**23 < most.max() <= 2**24  # and as fine as that allows
    after = [node.op_type for node in model.graph.node if node.op_type != "DequantizeLinear"]
    assert after[:6] == ["Cast", "Sub", "Conv", "Relu", "MaxPool", "Mul"]


def test_whole_numbers_change_nothing_but_the_edge(full, sample):
    images = sample[1].images.numpy()
    model = onnx.load(full.path / "model.onnx")
    before = answers(model, images)
    assert len(precisions.exact_first_convolution(model)) == 4
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(answers(model, images), before, atol=5e-3)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"network": "mlp"}, []),
        ({"activation": "leaky-relu"}, ["Conv", "MaxPool", "LeakyRelu", "Mul"]),
        ({"activation": "gelu"}, ["Conv", "MaxPool", "Mul"]),
        ({"convs": 2, "padding": "same", "batch_norm": True}, ["Conv", "Relu", "Mul"]),
    ],
    ids=["mlp", "leaky-relu", "gelu", "two convolutions"],
)
def test_int8_files_of_other_networks_answer_nearly_alike(options, kept, sample, tmp_path):
    torch.manual_seed(0)
    network = Network(NetworkConfig(**options), mean=72.94, std=90.02)
    images = sample[1].images.numpy()
    artefacts.write(Deployed(network).eval(), artefacts.choose(["onnx"], ["fp32"]), tmp_path, {})
    model = onnx.load(tmp_path / "model.onnx")
    before = answers(model, images)
    names = precisions.exact_first_convolution(model)
    kinds = {node.name: node.op_type for node in model.graph.node}
    assert [kinds[name] for name in names] == kept
    np.testing.assert_allclose(answers(model, images), before, atol=5e-3)
    precisions.write_int8(tmp_path / "model.onnx", tmp_path / "int8.onnx", sample[0].images)
    after = answers(onnx.load(tmp_path / "int8.onnx"), images)
    assert np.abs(after - before).max() < 0.1 * np.ptp(before)


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_compiled_package_answers_alike(checkpoint, sample, tmp_path):
    """`export` proves it over the test set."""
    bundle, report = export(checkpoint, sample[1], tmp_path, chosen=artefacts.choose(["aoti"], ["fp32"]))
    assert report.passed
    assert {row.file for row in report.rows if row.backend == "aoti"} == {"model.aoti.pt2"}
    with pytest.raises(DeviceError):
        open_backend("aoti", bundle, "cuda")


def test_a_checkpoint_from_elsewhere_is_exported_with_the_test_set_alone(checkpoint, small_data, tmp_path, capsys):
    checkpoints.save(checkpoint, tmp_path / "net.pt")
    whole = data.default_data_dir() / MODEL
    (tmp_path / MODEL).mkdir()
    for name in (data.TEST_IMAGES, data.TEST_LABELS):
        shutil.copy(whole / name, tmp_path / MODEL)
    words = ["--checkpoint", tmp_path / "net.pt", "--repository", tmp_path / "exported", "--data-dir", tmp_path]
    assert main(["export", *map(str, words), "--formats", "torchscript"]) == 0
    assert f"{MODEL}, 2 files with the right sha256" in capsys.readouterr().out
    assert list(open_bundle(tmp_path / "exported" / MODEL / "1").manifest.artefacts()) == ["model.pt"]
