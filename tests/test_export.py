import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import MODEL
from test_models import FORMS, used

from serving.bundle import open_bundle
from trainer import export as exporting
from trainer import train
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.export import ExportError, export
from trainer.models import Deployed


@pytest.fixture
def model(bundle):
    return onnx.load(bundle.path / "model.onnx")


def test_the_onnx_file_is_valid_and_portable(model):
    onnx.checker.check_model(model, full_check=True)
    assert [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")] == [20]
    assert model.ir_version <= 10
    assert not {"Shape", "Gather", "Concat"} & {node.op_type for node in model.graph.node}
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_the_onnx_file_names_its_axes_and_itself(model):
    (image,) = model.graph.input
    assert image.name == "image"
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    axes = image.type.tensor_type.shape.dim
    assert axes[0].dim_param == "batch"
    assert [axis.dim_value for axis in axes[1:]] == [1, 28, 28]
    assert [output.name for output in model.graph.output] == ["logits", "probabilities"]
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert about["model"] == MODEL
    assert json.loads(about["labels"])[9] == "Ankle boot"
    assert float(about["test_accuracy"]) > 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_every_batch_size_runs(bundle, sample, checkpoint, size):
    images = sample[1].images[:size]
    session = onnxruntime.InferenceSession(bundle.path / "model.onnx", providers=["CPUExecutionProvider"])
    logits, probabilities = session.run(None, {"image": images.numpy()})
    with torch.inference_mode():
        want = Deployed(checkpoint.build())(images)
    np.testing.assert_allclose(logits, want[0].numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(probabilities, want[1].numpy(), atol=1e-5)


def test_export_leaves_the_networks_answers_alone(bundle, sample, checkpoint):
    """The golden logits are those of the network that was trained, not of something the exporter made of it."""
    image, logits = bundle.golden()
    again = train.predict(checkpoint.build(), torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(again, logits, atol=1e-5)  # the last bits depend on torch's number of threads


def test_a_second_export_is_version_two(checkpoint, sample, tampered):
    bundle, report = export(checkpoint, sample[1], tampered)
    assert report.passed
    assert bundle.path == tampered / MODEL / "2"
    assert open_bundle(bundle.path).manifest.version == 2


def test_a_file_that_answers_otherwise_is_not_published(checkpoint, sample, tmp_path, monkeypatch):
    trained = exporting.Deployed

    def untrained(network):
        return trained(train.build(network.config, seed=99, mean=72.9, std=90.0))

    monkeypatch.setattr(exporting, "Deployed", untrained)
    with pytest.raises(ExportError) as raised:
        export(checkpoint, sample[1], tmp_path)
    assert "model.onnx, batch 1: logits" in str(raised.value)
    assert "model.pt, batch 3: logits" in str(raised.value)
    assert list((tmp_path / MODEL).iterdir()) == []


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_network_is_exported_and_proved(form, sample, tmp_path):
    """`export` publishes nothing that does not answer like PyTorch, with any batch size."""
    config = TrainConfig(dataset=MODEL, **form)
    bundle, report = export(
        Checkpoint(config.model_dump(mode="json"), used(form).state_dict(), []), sample[1], tmp_path
    )
    assert {row.backend for row in report.rows} == {"eager", "torchscript", "onnx"}
    assert report.passed
    assert bundle.manifest.network == config.name
    assert bundle.manifest.test_accuracy.n == 150
    kinds = {node.op_type for node in onnx.load(bundle.path / "model.onnx").graph.node}
    assert not kinds & {"BatchNormalization", "Dropout", "Shape"}  # the first is folded, the second gone
