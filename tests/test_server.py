"""The server over real channels: answers, errors, readiness, draining."""

import asyncio
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import onnx
import pytest
from conftest import MODEL, edit_manifest, holding, rehash, running
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from PIL import Image
from test_parity import change_weight

from protos import classifier_pb2 as pb
from protos import classifier_pb2_grpc
from protos import open_inference as pb_oip
from serving.bundle import open_bundle
from serving.client import Client
from serving.config import ServerConfig
from serving.errors import BundleError, InvalidArgument, NotFound, QueueFull, StartupError, Unavailable
from serving.server import Server

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def stub(served):
    with grpc.insecure_channel(served) as channel:
        yield classifier_pb2_grpc.ClassifierStub(channel)


@pytest.fixture
def images(sample) -> np.ndarray:
    return sample[1].images.numpy()


def health(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


def raw(images: np.ndarray, **fields) -> pb.PredictRequest:
    return pb.PredictRequest(raw=pb.RawImages(pixels=images.tobytes(), shape=images.shape), **fields)


# --- answers


@pytest.mark.parametrize("backend", ["onnx", "torchscript"])
@pytest.mark.parametrize("size", [1, 3, 150])
def test_answers_are_the_trained_models(repository, images, reference, backend, size):
    with running(repository, backend=backend) as server, Client(server.address) as client:
        result = client.predict(images[:size], top_k=10)
    assert (result.model, result.version, result.backend, result.device) == (MODEL, "1", backend, "cpu")
    assert result.provider == {"onnx": "CPUExecutionProvider", "torchscript": "torch"}[backend]
    assert len(result.predictions) == size
    for prediction, want in zip(result.predictions, reference[:size], strict=True):
        got = {score.class_id: score.probability for score in prediction.top_k}
        np.testing.assert_allclose([got[i] for i in range(10)], want, atol=1e-4)
        probabilities = [score.probability for score in prediction.top_k]
        assert probabilities == sorted(probabilities, reverse=True)
        assert prediction.label == prediction.top_k[0].label
        assert prediction.probability == prediction.top_k[0].probability


def test_top_k_and_id(stub, images):
    answer = stub.Predict(raw(images[:2], id="abc"))
    assert [len(p.top_k) for p in answer.predictions] == [1, 1]
    assert answer.id == "abc"
    assert [len(p.top_k) for p in stub.Predict(raw(images[:2], top_k=3)).predictions] == [3, 3]


def test_shape_may_be_left_to_the_byte_count(stub, images):
    request = pb.PredictRequest(raw=pb.RawImages(pixels=images[:5].tobytes()))
    assert len(stub.Predict(request).predictions) == 5


def test_concurrent_callers_get_their_own_answers(served, images, reference):
    want = reference.argmax(1)
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(images), rng.integers(1, 9)) for _ in range(200)]
    with Client(served) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pick: client.predict(images[pick]), picks))
    for pick, answer in zip(picks, answers, strict=True):
        assert [p.class_id for p in answer.predictions] == want[pick].tolist()


def test_a_stream_answers_in_order_and_survives_errors(stub, images, reference):
    def requests():
        for number in range(100):
            if number % 10 == 3:
                yield pb.PredictRequest(raw=pb.RawImages(pixels=b"short"), id=str(number))
            else:
                yield raw(images[number : number + 1], id=str(number))

    answers = list(stub.PredictStream(requests()))
    assert len(answers) == 100
    for number, answer in enumerate(answers):
        if number % 10 == 3:
            assert (answer.error.id, answer.error.code) == (str(number), grpc.StatusCode.INVALID_ARGUMENT.value[0])
            assert answer.error.message == "raw.pixels: got 5 bytes, want 784 for each image"
        else:
            assert answer.response.id == str(number)
            assert answer.response.predictions[0].class_id == reference[number].argmax()


def test_a_stream_that_its_client_leaves_harms_nobody(served, stub, images):
    def endless():
        while True:
            yield raw(images[:64])

    stream = stub.PredictStream(endless())
    next(stream)
    stream.cancel()
    with Client(served) as client:
        assert len(client.predict(images[:3]).predictions) == 3


def test_list_models(stub, checkpoint):
    (model,) = stub.ListModels(pb.ListModelsRequest()).models
    assert (model.name, model.version, model.state, model.reason) == (MODEL, "1", pb.Model.STATE_READY, "")
    assert (model.backend, model.provider, model.device) == ("onnx", "CPUExecutionProvider", "cpu")
    assert model.labels[9] == "Ankle boot"
    assert (model.test_accuracy, model.test_images) == (checkpoint.test_accuracy, 150)
    assert model.golden_max_abs < 1e-4


def test_a_generic_client_calls_list_models_through_reflection(served):
    """As grpcurl does: with nothing but the address."""
    with grpc.insecure_channel(served) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            "classifier.v1.Classifier",
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        assert len(database.FindFileContainingSymbol("inference.GRPCInferenceService").service[0].method) == 20
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("classifier.v1.Classifier").methods_by_name["ListModels"]
        call = channel.unary_unary(
            "/classifier.v1.Classifier/ListModels",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )
        answer = call(message_factory.GetMessageClass(method.input_type)(), timeout=5)
    assert [model.name for model in answer.models] == [MODEL]


# --- errors: every row of the table, code and text

GREY = np.zeros((2, 1, 28, 28), np.uint8)


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (pb.PredictRequest(), "INVALID_ARGUMENT", "input: got none, want raw or encoded images"),
        (
            pb.PredictRequest(raw=pb.RawImages()),
            "INVALID_ARGUMENT",
            "raw.pixels: got 0 bytes, want 784 for each image",
        ),
        (
            pb.PredictRequest(raw=pb.RawImages(pixels=bytes(785))),
            "INVALID_ARGUMENT",
            "raw.pixels: got 785 bytes, want 784 for each image",
        ),
        (
            pb.PredictRequest(raw=pb.RawImages(pixels=bytes(784), shape=[1, 28, 28])),
            "INVALID_ARGUMENT",
            "image: got shape [1,28,28], want [batch,1,28,28]",
        ),
        (
            pb.PredictRequest(raw=pb.RawImages(pixels=bytes(784), shape=[-1, 1, 28, 28])),
            "INVALID_ARGUMENT",
            "image: got shape [-1,1,28,28], want [batch,1,28,28]",
        ),
        (
            pb.PredictRequest(raw=pb.RawImages(pixels=bytes(784), shape=[2, 1, 28, 28])),
            "INVALID_ARGUMENT",
            "raw.pixels: got 784 bytes, want 1568 for shape [2,1,28,28]",
        ),
        (
            pb.PredictRequest(raw=pb.RawImages(pixels=bytes(784 * 201))),
            "INVALID_ARGUMENT",
            "batch: got 201 images, want 1 to 200 (--max-batch-size)",
        ),
        (
            pb.PredictRequest(encoded=pb.EncodedImages()),
            "INVALID_ARGUMENT",
            "batch: got 0 images, want 1 to 200 (--max-batch-size)",
        ),
        (
            pb.PredictRequest(encoded=pb.EncodedImages(images=[b"hello"])),
            "INVALID_ARGUMENT",
            "encoded.images[0]: 5 bytes that are not a picture; want one of PNG, JPEG, WEBP, GIF, BMP",
        ),
        (
            pb.PredictRequest(encoded=pb.EncodedImages(images=[b"hello"], polarity=7)),
            "INVALID_ARGUMENT",
            "encoded.polarity: got 7, want 0, 1 or 2",
        ),
        (raw(GREY, top_k=11), "INVALID_ARGUMENT", "top_k: got 11, want at most 10, the number of classes"),
        (
            raw(GREY, model="cats"),
            "NOT_FOUND",
            "Request for unknown model: 'cats' is not found; this server has: fashion-mnist",
        ),
        (
            raw(GREY, version="9"),
            "NOT_FOUND",
            "Request for unknown model: 'fashion-mnist' version 9 is not found; "
            "this server has: fashion-mnist version 1",
        ),
        (
            raw(GREY, version="latest"),
            "INVALID_ARGUMENT",
            "failed to get model version from specified version string 'latest', "
            "version should be an integral value > 0",
        ),
    ],
)
def test_a_wrong_request_gets_its_status_and_text(small, caplog, request_, code, text):
    with pytest.raises(grpc.RpcError) as raised:
        small.Predict(request_)
    assert (raised.value.code().name, raised.value.details()) == (code, text)
    assert not caplog.records  # a client's mistake is nothing to log
    assert len(small.Predict(raw(GREY)).predictions) == 2


@pytest.fixture(scope="module")
def small(repository):
    """A stub of a server that takes 200 images at most in a request."""
    with running(repository, max_batch_size=200) as server, grpc.insecure_channel(server.address) as channel:
        yield classifier_pb2_grpc.ClassifierStub(channel)


def test_a_message_over_the_limit_is_refused(repository):
    with running(repository, max_message_bytes=5000) as server, grpc.insecure_channel(server.address) as channel:
        stub = classifier_pb2_grpc.ClassifierStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Predict(raw(np.zeros((10, 1, 28, 28), np.uint8)))
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(stub.Predict(raw(GREY)).predictions) == 2


def test_garbage_instead_of_a_message_is_refused(served, stub):
    with grpc.insecure_channel(served) as channel:
        call = channel.unary_unary("/classifier.v1.Classifier/Predict")
        with pytest.raises(grpc.RpcError) as raised:
            call(b"\xff" * 50, timeout=5)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.details().startswith("50 bytes that are not a classifier.v1.PredictRequest")
    assert len(stub.Predict(raw(GREY)).predictions) == 2


@pytest.fixture
def held(repository, monkeypatch):
    """A server whose model is held, and the backend."""
    with holding(repository, monkeypatch, max_queue=1, drain_s=10.0) as both:
        yield both


def test_a_full_queue_refuses_at_once(held):
    server, backend = held
    with Client(server.address) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.predict, GREY)
        assert backend.started.wait(10)
        with pytest.raises(QueueFull, match="model fashion-mnist: 1 requests wait already"):
            client.predict(GREY)
        request = pb.PredictRequest(raw=pb.RawImages(pixels=bytes(784)))
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as refused:
            classifier_pb2_grpc.ClassifierStub(channel).Predict(request, timeout=10)
        assert _retry_s(refused.value) > 0
        backend.released.set()
        assert len(first.result().predictions) == 2
        assert len(client.predict(GREY).predictions) == 2


def test_where_one_model_is_full_requests_are_refused_unread(held):
    server, backend = held
    with (
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor(1) as pool,
        Client(server.address) as client,
    ):
        first = pool.submit(client.predict, GREY)
        assert backend.started.wait(10)
        infer = channel.unary_unary(pb_oip.RPCS["ModelInfer"].path)
        with pytest.raises(grpc.RpcError) as refused:
            infer(b"not a request")
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert _retry_s(refused.value) > 0
        assert client.list_models()[0].version == "1"  # what needs no room is answered
        backend.released.set()
        first.result()
        with pytest.raises(grpc.RpcError) as refused:
            infer(b"not a request")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def _retry_s(refused):
    """When to try again, seconds, from the details that a status carries."""
    status = status_pb2.Status.FromString(dict(refused.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (refused.code().value[0], refused.details())
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    return info.retry_delay.ToTimedelta().total_seconds()


def test_a_stopping_server_finishes_what_runs_and_refuses_the_rest(held):
    server, backend = held
    with Client(server.address) as client, ThreadPoolExecutor(2) as pool:
        first = pool.submit(client.predict, GREY)
        assert backend.started.wait(10)
        stopping = pool.submit(server.stop)
        patience = time.monotonic() + 10
        while health_or_none(server.address) == SERVING:
            assert time.monotonic() < patience
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as raised:
            classifier_pb2_grpc.ClassifierStub(channel).Predict(raw(GREY), timeout=5)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        backend.released.set()
        assert len(first.result().predictions) == 2
        stopping.result()


def health_or_none(address: str) -> int | None:
    try:
        return health(address)
    except grpc.RpcError:
        return None


def test_a_passed_deadline_is_told(repository, monkeypatch):
    """By the protocol's own timeout, since the caller's deadline ends the call at the caller's side."""
    with (
        holding(repository, monkeypatch) as (server, backend),
        grpc.insecure_channel(server.address) as channel,
        Client(server.address) as other,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(other.predict, GREY)
        assert backend.started.wait(10)
        request = pb_oip.ModelInferRequest(model_name=MODEL)
        request.inputs.add(name="image", datatype="UINT8", shape=GREY.shape)
        request.raw_input_contents.append(GREY.tobytes())
        request.parameters["timeout"].int64_param = 1000  # microseconds
        late = pool.submit(channel.unary_unary(pb_oip.RPCS["ModelInfer"].path), request.SerializeToString())
        time.sleep(0.2)  # the deadline must pass while the request waits
        backend.released.set()
        with pytest.raises(grpc.RpcError) as raised:
            late.result()
        first.result()
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert raised.value.details() == "model fashion-mnist: the deadline passed before the model ran"
    assert backend.runs == 1


def test_pictures_that_are_too_many_together_are_refused(repository):
    buffer = io.BytesIO()
    Image.new("L", (100, 100)).save(buffer, "PNG")
    with running(repository, max_image_pixels=25_000) as server, Client(server.address) as client:
        assert len(client.predict([buffer.getvalue()] * 2).predictions) == 2
        with pytest.raises(
            InvalidArgument, match=r"encoded\.images\[2\]: picture of 100 x 100 pixels, want at most 5000"
        ):
            client.predict([buffer.getvalue()] * 3)


def test_an_unexpected_error_tells_the_client_nothing(repository, monkeypatch, caplog):
    with running(repository) as server, grpc.insecure_channel(server.address) as channel:
        monkeypatch.setattr("serving.services.classifier._response", lambda *arguments: 1 / 0)
        with pytest.raises(grpc.RpcError) as raised:
            classifier_pb2_grpc.ClassifierStub(channel).Predict(raw(GREY))
    assert (raised.value.code().name, raised.value.details()) == ("INTERNAL", "internal error")
    assert "ZeroDivisionError" in caplog.text


# --- the gate: what may not be served is not


def test_health_is_serving_when_all_is_ready(served):
    for service in ("", MODEL, "classifier.v1.Classifier", "inference.GRPCInferenceService"):
        assert health(served, service) == SERVING
    with pytest.raises(grpc.RpcError) as raised:
        health(served, "cats")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_watch_tells_when_the_server_stops(repository):
    with running(repository) as server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""))
        assert next(watch).status == SERVING
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(server.stop)
            assert next(watch).status == NOT_SERVING
            stopping.result()


def reverse_labels(version):
    labels = open_bundle(version).manifest.labels[::-1]
    edit_manifest(version, labels=labels)


def reverse_labels_everywhere(version):
    reverse_labels(version)
    text = (version / "labels.txt").read_text().splitlines()[::-1]
    (version / "labels.txt").write_text("".join(f"{label}\n" for label in text))
    rehash(version, "labels.txt")


def rename_output(version):
    model = onnx.load(version / "model.onnx")
    model.graph.output[1].name = "scores"
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "probabilities" else name for name in node.output]
    onnx.save(model, version / "model.onnx")
    rehash(version, "model.onnx")
    outputs = json.loads((version / "manifest.json").read_text())["outputs"]
    outputs[1]["name"] = "scores"
    edit_manifest(version, outputs=outputs)


def stale_golden(version):
    image, logits = open_bundle(version).golden()
    np.savez(version / "golden.npz", image=image, logits=logits + np.float32(0.01))
    rehash(version, "golden.npz")


def golden_that_is_no_number(version):
    image, logits = open_bundle(version).golden()
    logits[7, 3] = np.nan
    np.savez(version / "golden.npz", image=image, logits=logits)
    rehash(version, "golden.npz")


def drop_labels(version):
    edit_manifest(version, labels=[])


def flip_byte(version):
    content = bytearray((version / "model.onnx").read_bytes())
    content[-100] ^= 1
    (version / "model.onnx").write_bytes(content)


def garble_onnx(version):
    (version / "model.onnx").write_bytes(b"not a model")
    rehash(version, "model.onnx")


def rename_input(version):
    model = onnx.load(version / "model.onnx")
    model.graph.input[0].name = "picture"
    for node in model.graph.node:
        node.input[:] = ["picture" if name == "image" else name for name in node.input]
    onnx.save(model, version / "model.onnx")
    rehash(version, "model.onnx")


def change_one_weight(version):
    change_weight(version, 1.01)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_byte, r"model\.onnx: sha256 is"),
        (change_one_weight, "the answers on cpu .* are not the trained model's"),
        (garble_onnx, "ONNX Runtime cannot open the model"),
        (rename_input, "model.onnx's signature is not the manifest's"),
        (drop_labels, r"manifest\.json: labels"),
        (reverse_labels, r"its labels are not those of labels\.txt"),
        (reverse_labels_everywhere, "model.onnx's labels are .*, not the manifest's"),
        (rename_output, "fashion-mnist version 1 cannot be run: KeyError: 'probabilities'"),
        (stale_golden, "the answers on cpu .* are not the trained model's"),
        (golden_that_is_no_number, r"golden\.npz: .* do not fit"),
        (lambda version: (version / "manifest.json").unlink(), "a version without its manifest is not complete"),
        (lambda version: (version / "weights.pt").unlink(), r"weights\.pt: No such file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_version_is_not_served(tampered, damage, reason):
    damage(tampered / MODEL / "1")
    with pytest.raises(StartupError, match=reason), running(tampered):
        pass


def test_one_damaged_model_leaves_the_others_served(tampered, images):
    (tampered / MODEL).rename(tampered / "good")
    edit_manifest(tampered / "good" / "1", model="good")
    (tampered / "bad" / "3").mkdir(parents=True)
    with running(tampered) as server, Client(server.address) as client:
        good, bad = sorted(client.list_models(), key=lambda model: model.name != "good")
        assert (good.state, bad.state, bad.version) == ("READY", "UNAVAILABLE", "3")
        assert "manifest.json" in bad.reason
        assert health(server.address, "good") == SERVING
        assert health(server.address, "bad") == health(server.address) == NOT_SERVING
        assert len(client.predict(images[:2], model="good").predictions) == 2
        with pytest.raises(Unavailable, match=r"'bad' version 3 is not at ready state; .*manifest"):
            client.predict(images[:2], model="bad")
        with pytest.raises(InvalidArgument, match="model: got none, want one of: bad, good"):
            client.predict(images[:2])
    with running(tampered, models=("good",)) as server:
        assert health(server.address) == SERVING


def test_without_a_model_the_server_says_that_none_is_loaded(repository, images):
    unknown = f"Request for unknown model: '{MODEL}' is not found; no model is loaded"
    with running(repository, model_control="explicit") as server, Client(server.address) as client:
        with pytest.raises(NotFound, match=f"^{unknown}$"):
            client.predict(images[:2], model=MODEL)
        with pytest.raises(InvalidArgument, match=r"^model: got none, and no model is loaded$"):
            client.predict(images[:2])
        server.server.repository.load(MODEL)
        server.server.repository.unload(MODEL)
        with pytest.raises(NotFound, match=r"'cats' is not found; no model is loaded$"):
            client.predict(images[:2], model="cats")


def test_while_models_load_the_server_is_live_and_not_ready(repository):
    async def scenario():
        server = Server(ServerConfig(repository=repository, port=0, device="cpu", drain_s=0))
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            assert (await check(health_pb2.HealthCheckRequest(service=""))).status == NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await classifier_pb2_grpc.ClassifierStub(channel).Predict(raw(GREY))
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
            assert raised.value.details() == (
                "Request for unknown model: 'fashion-mnist' version 1 is not at ready state; it is loading"
            )
            await server.load()
            assert (await check(health_pb2.HealthCheckRequest(service=""))).status == SERVING
        await server.stop()

    asyncio.run(scenario())


def test_a_port_in_use_is_an_error(served, repository):
    port = int(served.rpartition(":")[2])
    with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}"), running(repository, port=port):
        pass


def test_a_model_that_is_not_there_is_named(repository):
    with pytest.raises(BundleError, match="no model cats; it has fashion-mnist"), running(repository, models=("cats",)):
        pass
