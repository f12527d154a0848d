"""Triton's own client, imported in the same process, against a real server."""

import asyncio
import queue
import shutil

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
from conftest import MODEL, running
from grpc_health.v1 import health_pb2, health_pb2_grpc
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from serving.bundle import ONNX
from serving.errors import StartupError


@pytest.fixture(scope="module")
def explicit(repository, tmp_path_factory):
    """A server whose clients load and unload; it serves plain ONNX files too."""
    root = tmp_path_factory.mktemp("mixed")
    shutil.copytree(repository / MODEL, root / MODEL)
    plain(root / "sum" / "1", [sum_of_two()])
    plain(root / "words" / "1", [echo(TensorProto.STRING, ["n"])])
    plain(root / "half" / "1", [echo(TensorProto.FLOAT16, ["n", 4])])
    plain(root / "fixed" / "1", [echo(TensorProto.INT64, [3, 2])])
    plain(root / "axes" / "1", [sum_of_two(["n", "m"])])
    (root / "broken" / "1").mkdir(parents=True)
    (root / "broken" / "1" / ONNX).write_bytes(b"not a model")
    with running(root, model_control="explicit", allow_unverified=True, max_batch_size=64) as server:
        yield server.address


def plain(version, models):
    version.mkdir(parents=True)
    onnx.save(models[0], version / ONNX)


def model_of(nodes, inputs, outputs):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])


def echo(kind, shape):
    return model_of(
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, shape)],
    )


def sum_of_two(shape=("n", 3)):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("a", "b", "sum", "left")]
    nodes = [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Sub", ["a", "b"], ["left"])]
    return model_of(nodes, values[:2], values[2:])


@pytest.fixture
def client(explicit):
    with tritonclient.grpc.InferenceServerClient(explicit) as client:
        if not client.is_model_ready(MODEL):
            client.load_model(MODEL)
        yield client


@pytest.fixture
def images(sample) -> np.ndarray:
    return sample[1].images.numpy()


def tensor(name, array, datatype, grpc=tritonclient.grpc):
    given = grpc.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


def test_live_ready_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    assert not client.is_model_ready("cats")
    assert not client.is_model_ready(MODEL, "2")
    server = client.get_server_metadata()
    assert server.name == "parityserve"
    assert "statistics" in server.extensions
    model = client.get_model_metadata(MODEL)
    assert (model.platform, list(model.versions)) == ("onnxruntime_onnx", ["1"])
    (image,) = model.inputs
    assert (image.name, image.datatype, list(image.shape)) == ("image", "UINT8", [-1, 1, 28, 28])
    assert [(output.name, list(output.shape)) for output in model.outputs] == [
        ("logits", [-1, 10]),
        ("probabilities", [-1, 10]),
    ]


def test_config_agrees_with_metadata(client):
    config = client.get_model_config(MODEL).config
    assert (config.name, config.platform, config.backend) == (MODEL, "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 64
    assert [(i.name, i.data_type, list(i.dims), i.format) for i in config.input] == [("image", 2, [1, 28, 28], 2)]
    assert [(o.name, o.data_type, list(o.dims), o.label_filename) for o in config.output] == [
        ("logits", 11, [10], "labels.txt"),
        ("probabilities", 11, [10], "labels.txt"),
    ]
    assert config.HasField("dynamic_batching")
    assert config.parameters["provider"].string_value == "CPUExecutionProvider"
    assert config.parameters["verified"].string_value == "true"


def test_infer_several_outputs_in_the_order_asked_for(client, images, reference):
    outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in ("probabilities", "logits")]
    inputs = [tensor("image", images[:64], "UINT8")]
    result = client.infer(MODEL, inputs, outputs=outputs, request_id="seven")
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("seven", MODEL, "1")
    assert [output.name for output in response.outputs] == ["probabilities", "logits"]
    np.testing.assert_allclose(result.as_numpy("probabilities"), reference[:64], atol=1e-4)
    assert result.as_numpy("logits").argmax(1).tolist() == reference[:64].argmax(1).tolist()


def test_outputs_that_are_not_asked_for_are_all(client, images):
    response = client.infer(MODEL, [tensor("image", images[:2], "UINT8")]).get_response()
    assert [output.name for output in response.outputs] == ["logits", "probabilities"]
    assert [len(raw) for raw in response.raw_output_contents] == [80, 80]


def test_classification(client, images, reference):
    outputs = [tritonclient.grpc.InferRequestedOutput("probabilities", class_count=3)]
    found = client.infer(MODEL, [tensor("image", images[:5], "UINT8")], outputs=outputs).as_numpy("probabilities")
    assert found.shape == (5, 3)
    labels = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    for row, want in zip(found, reference, strict=False):
        for text, index in zip(row, np.argsort(-want)[:3], strict=True):
            score, found_index, label = text.decode().split(":")
            assert (int(found_index), label) == (index, labels[index])
            assert float(score) == pytest.approx(want[index], abs=1e-4)


def test_async_infer(client, images, reference):
    answers = queue.Queue()
    for number in range(40):
        client.async_infer(
            MODEL,
            [tensor("image", images[number : number + 1], "UINT8")],
            lambda result, error: answers.put((result, error)),
            request_id=str(number),
        )
    for _ in range(40):
        result, error = answers.get(timeout=20)
        assert error is None
        number = int(result.get_response().id)
        assert result.as_numpy("logits").argmax() == reference[number].argmax()


def test_streaming_carries_ids_and_survives_errors(client, images, reference):
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(30):
        image = images[number : number + 1] if number % 5 else images[number : number + 1, :, :27]
        client.async_stream_infer(
            MODEL, [tensor("image", np.ascontiguousarray(image), "UINT8")], request_id=str(number)
        )
    seen = [answers.get(timeout=20) for _ in range(30)]
    client.stop_stream()
    assert [error is not None for _, error in seen] == [number % 5 == 0 for number in range(30)]
    for number, (result, error) in enumerate(seen):
        if error:
            assert "unexpected shape for input 'image'" in error.message()
        else:
            assert result.get_response().id == str(number)
            assert result.as_numpy("logits").argmax() == reference[number].argmax()


def test_the_asyncio_client(explicit, client, images, reference):
    async def scenario():
        async with tritonclient.grpc.aio.InferenceServerClient(explicit) as aio:
            assert await aio.is_server_live()
            assert await aio.is_server_ready()
            assert await aio.is_model_ready(MODEL)
            assert (await aio.get_model_metadata(MODEL)).name == MODEL
            assert (await aio.get_model_config(MODEL)).config.max_batch_size == 64
            results = await asyncio.gather(
                *(aio.infer(MODEL, [tensor("image", images[i : i + 2], "UINT8")]) for i in range(20))
            )
            for i, result in enumerate(results):
                assert result.as_numpy("logits").argmax(1).tolist() == reference[i : i + 2].argmax(1).tolist()
            assert (await aio.get_inference_statistics(MODEL)).model_stats[0].inference_count >= 40

            async def requests():
                for i in range(10):
                    yield {
                        "model_name": MODEL,
                        "inputs": [tensor("image", images[i : i + 1], "UINT8")],
                        "request_id": str(i),
                    }

            answers = [answer async for answer in aio.stream_infer(requests())]
            assert [(error, result.get_response().id) for result, error in answers] == [
                (None, str(i)) for i in range(10)
            ]

    asyncio.run(scenario())


def test_a_model_is_replaced_without_a_request_lost(tampered, images):
    with (
        running(tampered, model_control="explicit", models=(MODEL,)) as server,
        tritonclient.grpc.InferenceServerClient(server.address) as client,
        tritonclient.grpc.InferenceServerClient(server.address) as control,
    ):
        answers = queue.Queue()
        for number in range(300):
            client.async_infer(
                MODEL, [tensor("image", images[:3], "UINT8")], lambda result, error: answers.put((result, error))
            )
            if number % 60 == 30:
                control.load_model(MODEL)
        assert [answers.get(timeout=20)[1] for _ in range(300)] == [None] * 300


def test_a_failed_load_of_another_model_leaves_the_server_ready(client, explicit):
    with pytest.raises(InferenceServerException, match="failed to load 'broken'"):
        client.load_model("broken")
    client.load_model("sum")
    assert client.is_server_ready()
    with grpc.insecure_channel(explicit) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        states = {
            name: check(health_pb2.HealthCheckRequest(service=name)).status for name in ("", MODEL, "sum", "broken")
        }
    assert states == {"": 1, MODEL: 1, "sum": 1, "broken": 2}


def test_statistics_add_up(client, images):
    client.unload_model(MODEL)
    client.load_model(MODEL)  # counted from here on
    for rows in (1, 1, 3):
        client.infer(MODEL, [tensor("image", images[:rows], "UINT8")], priority=5, timeout=10_000_000)
    with pytest.raises(InferenceServerException):
        client.infer(MODEL, [tensor("image", images[:65], "UINT8")])
    (counted,) = client.get_inference_statistics(MODEL).model_stats
    assert (counted.inference_count, counted.execution_count) == (5, 3)
    assert counted.last_inference > 1_700_000_000_000
    stats = counted.inference_stats
    assert (stats.success.count, stats.fail.count) == (3, 1)
    parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert all(part.count == 3 for part in parts)
    assert sum(part.ns for part in parts) == stats.success.ns
    assert [(batch.batch_size, batch.compute_infer.count) for batch in counted.batch_stats] == [(1, 2), (3, 1)]
    assert sum(batch.compute_infer.ns for batch in counted.batch_stats) == stats.compute_infer.ns


def test_models_are_loaded_and_unloaded(client, images):
    index = {model.name: model for model in client.get_model_repository_index().models}
    assert set(index) == {MODEL, "sum", "words", "half", "fixed", "axes", "broken"}
    assert (index[MODEL].version, index[MODEL].state) == ("1", "READY")
    client.load_model("sum")
    assert client.is_model_ready("sum")
    client.unload_model("sum")
    assert not client.is_model_ready("sum")
    index = {model.name: model for model in client.get_model_repository_index().models}
    assert (index["sum"].state, index["sum"].reason) == ("UNAVAILABLE", "unloaded")
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'sum' has no available versions"):
        client.get_model_metadata("sum")
    with pytest.raises(InferenceServerException, match="failed to load 'cats', failed to poll from model repository"):
        client.load_model("cats")
    with pytest.raises(InferenceServerException, match="model name must not contain path traversal characters"):
        client.load_model("../exported")
    with pytest.raises(InferenceServerException, match="Model name cannot be empty"):
        client.load_model("")
    with pytest.raises(InferenceServerException, match="failed to load 'broken', ONNX Runtime cannot open the model"):
        client.load_model("broken")
    assert [model.name for model in client.get_model_repository_index().models if model.name == "broken"]


def test_a_server_may_start_with_nothing_to_serve(repository, tmp_path):
    with (
        running(tmp_path, model_control="explicit") as server,
        tritonclient.grpc.InferenceServerClient(server.address) as client,
    ):
        assert client.is_server_ready()
        assert not client.get_model_repository_index().models
        shutil.copytree(repository / MODEL, tmp_path / MODEL)
        client.load_model(MODEL)
        assert client.is_model_ready(MODEL)


def test_a_failed_load_leaves_what_is_served(tampered, images):
    with (
        running(tampered, model_control="explicit", models=(MODEL,)) as server,
        tritonclient.grpc.InferenceServerClient(server.address) as client,
    ):
        (tampered / MODEL / "2").mkdir()
        with pytest.raises(InferenceServerException, match="not complete"):
            client.load_model(MODEL)
        assert client.infer(MODEL, [tensor("image", images[:1], "UINT8")]).get_response().model_version == "1"
        (tampered / MODEL / "2").rmdir()
        client.load_model(MODEL)
        assert client.is_model_ready(MODEL, "1")


def test_models_are_not_loaded_where_that_is_not_allowed(served):
    with tritonclient.grpc.InferenceServerClient(served) as client:
        for call in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="explicit model load / unload is not allowed") as raised:
                call(MODEL)
            assert raised.value.status() == "StatusCode.UNAVAILABLE"


def test_any_onnx_model_is_served(client):
    for name in ("sum", "words", "half", "fixed"):
        client.load_model(name)
    a, b = np.ones((2, 3), np.float32), np.full((2, 3), 5, np.float32)
    result = client.infer("sum", [tensor("b", b, "FP32"), tensor("a", a, "FP32")])
    assert (result.as_numpy("sum") == 6).all()
    assert (result.as_numpy("left") == -4).all()
    words = np.array([b"one", b"", "três".encode()], dtype=object)
    assert client.infer("words", [tensor("x", words, "BYTES")]).as_numpy("y").tolist() == words.tolist()
    half = np.array([[0.5, -1, 65504, np.inf]], np.float16)
    assert np.array_equal(client.infer("half", [tensor("x", half, "FP16")]).as_numpy("y"), half)
    with pytest.raises(InferenceServerException, match="input 'x' has an element that is not UTF-8"):
        client.infer("words", [tensor("x", np.array([b"\xff"], dtype=object), "BYTES")])
    client.load_model("axes")
    with pytest.raises(InferenceServerException, match="Axis m is 4, but 3 in input 'a'"):
        client.infer("axes", [tensor("a", a, "FP32"), tensor("b", np.ones((2, 4), np.float32), "FP32")])
    fixed = np.arange(6).reshape(3, 2)
    assert np.array_equal(client.infer("fixed", [tensor("x", fixed, "INT64")]).as_numpy("y"), fixed)
    assert client.get_model_config("fixed").config.max_batch_size == 0
    assert client.get_model_config("sum").config.parameters["verified"].string_value == "false"


def test_a_plain_model_is_not_served_unasked(repository, tmp_path):
    plain(tmp_path / "sum" / "1", [sum_of_two()])
    with pytest.raises(StartupError, match="a version without its manifest is not complete"), running(tmp_path):
        pass


@pytest.mark.parametrize(
    ("inputs", "model", "version", "status", "text"),
    [
        (
            lambda x: [tensor("image", x, "UINT8")],
            "cats",
            "",
            "NOT_FOUND",
            "Request for unknown model: 'cats' is not found",
        ),
        (lambda x: [tensor("image", x, "UINT8")], MODEL, "99", "NOT_FOUND", f"'{MODEL}' version 99 is not found"),
        (
            lambda x: [tensor("image", x, "UINT8")],
            MODEL,
            "wrong_specification",
            "INVALID_ARGUMENT",
            "failed to get model version from specified version string 'wrong_specification'",
        ),
        (
            lambda x: [tensor("image", x.astype(np.float32), "FP32")],
            MODEL,
            "",
            "INVALID_ARGUMENT",
            f"inference input 'image' data-type is 'FP32', but model '{MODEL}' expects 'UINT8'",
        ),
        (
            lambda x: [tensor("image", x[0], "UINT8")],
            MODEL,
            "",
            "INVALID_ARGUMENT",
            f"unexpected shape for input 'image' for model '{MODEL}'. Expected [-1,1,28,28], got [1,28,28]. ",
        ),
        (
            lambda x: [tensor("image", np.repeat(x, 65, 0), "UINT8")],
            MODEL,
            "",
            "INVALID_ARGUMENT",
            f"inference request batch-size must be <= 64 for '{MODEL}'",
        ),
        (
            lambda x: [tensor("picture", x, "UINT8")],
            MODEL,
            "",
            "INVALID_ARGUMENT",
            f"unexpected inference input 'picture' for model '{MODEL}'",
        ),
    ],
)
def test_errors_have_tritons_texts(client, images, inputs, model, version, status, text):
    with pytest.raises(InferenceServerException) as raised:
        client.infer(model, inputs(images[:1]), model_version=version)
    assert raised.value.status() == f"StatusCode.{status}"
    assert text in raised.value.message()


def test_what_is_not_offered_is_said_cleanly(client):
    assert not client.get_system_shared_memory_status().regions
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    for call in (lambda: client.register_system_shared_memory("r", "/r", 64), client.get_trace_settings):
        with pytest.raises(InferenceServerException) as raised:
            call()
        assert raised.value.status() == "StatusCode.UNIMPLEMENTED"
