"""Properties over a real server: nobody gets another's rows, and nothing that comes in harms it."""

import asyncio

import grpc
import numpy as np
import pytest
from conftest import MODEL, running

from protos import open_inference as pb

INFER = pb.RPCS["ModelInfer"].path
STREAM = pb.RPCS["ModelStreamInfer"].path
FUZZED = 50_000
IN_FLIGHT = 64
EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
}


def infer_request(images: np.ndarray, request_id: str = "") -> bytes:
    request = pb.ModelInferRequest(model_name=MODEL, id=request_id)
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    request.raw_input_contents.append(images.tobytes())
    return request.SerializeToString()


def logits(response: pb.ModelInferResponse) -> np.ndarray:
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(-1, 10)


def test_any_interleaving_of_calls_and_streams_gives_each_caller_its_own_rows(repository, sample, reference):
    images, want = sample[1].images.numpy(), reference.argmax(1)
    rng = np.random.default_rng(0)

    def pick():
        return rng.integers(0, len(images), rng.integers(1, 12))

    async def unary(channel):
        call = channel.unary_unary(INFER)
        for _ in range(25):
            rows = pick()
            response = pb.ModelInferResponse.FromString(await call(infer_request(images[rows])))
            assert logits(response).argmax(1).tolist() == want[rows].tolist()
            await asyncio.sleep(rng.random() * 0.002)

    async def streamed(channel):
        stream = channel.stream_stream(STREAM)()
        picks = [pick() for _ in range(25)]

        async def write():
            for number, rows in enumerate(picks):
                await stream.write(infer_request(images[rows], str(number)))
            await stream.done_writing()

        writer = asyncio.create_task(write())
        answered = 0
        async for data in stream:
            answer = pb.ModelStreamInferResponse.FromString(data)
            assert not answer.error_message
            rows = picks[int(answer.infer_response.id)]
            assert logits(answer.infer_response).argmax(1).tolist() == want[rows].tolist()
            answered += 1
        await writer
        assert answered == len(picks)

    async def scenario(address):
        async with grpc.aio.insecure_channel(address) as one, grpc.aio.insecure_channel(address) as two:
            await asyncio.gather(*(unary(one) for _ in range(20)), *(streamed(two) for _ in range(10)))

    with running(repository, max_batch_size=32) as server:
        asyncio.run(scenario(server.address))
        (status,) = server.server.repository.statuses()
        statistics = status.served.statistics
    assert statistics.success.count == 30 * 25
    assert statistics.execution_count < statistics.success.count  # requests did run together


# --- fuzz

_TEXTS = [
    "",
    MODEL,
    "cats",
    "image",
    "logits",
    "UINT8",
    "FP32",
    "BYTES",
    "\x00",
    "../..",
    "ü" * 50,
    "1",
    "-1",
    "9" * 5000,
]
_KEYS = ["timeout", "priority", "classification", "sequence_id", "binary_data_output", "triton_x", *_TEXTS]
_KEYS += ["shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"]
_NUMBERS = [0, 1, -1, 2, 3, 10, 28, 784, 2**31 - 1, 2**31, 2**62, -(2**63), 2**63 - 1]


class Fuzzer:
    """Requests that are right but for a few changes, drawn from a seed."""

    def __init__(self, images: np.ndarray, seed: int):
        self._rng = np.random.default_rng(seed)
        self._images = images
        self._changes = [self._name, self._version, self._input, self._shape, self._raw, self._contents]
        self._changes += [self._parameter, self._output]

    def _of(self, values):
        return values[self._rng.integers(len(values))]

    def request(self) -> bytes:
        message = pb.ModelInferRequest(model_name=MODEL, id="f")
        images = self._images[: self._rng.integers(1, 4)]
        message.inputs.add(name="image", datatype="UINT8", shape=images.shape)
        message.raw_input_contents.append(images.tobytes())
        for _ in range(self._rng.integers(1, 4)):
            self._of(self._changes)(message)
        data = message.SerializeToString()
        if self._rng.random() < 0.2:
            data = self._damage(data)
        return data

    def _name(self, message):
        message.model_name = self._of(_TEXTS)

    def _version(self, message):
        message.model_version = self._of(_TEXTS)

    def _input(self, message):
        tensor = message.inputs[0] if message.inputs and self._rng.random() < 0.7 else message.inputs.add()
        tensor.name, tensor.datatype = self._of([("image", self._of(_TEXTS)), (self._of(_TEXTS), "UINT8")])
        if self._rng.random() < 0.1:
            del message.inputs[:]

    def _shape(self, message):
        for tensor in message.inputs:
            tensor.shape[:] = [int(self._of(_NUMBERS)) for _ in range(self._rng.integers(0, 7))]

    def _raw(self, message):
        if self._rng.random() < 0.3:
            del message.raw_input_contents[:]
        for _ in range(self._rng.integers(0, 3)):
            message.raw_input_contents.append(self._rng.bytes(int(self._of([0, 1, 3, 783, 784, 785, 1568]))))

    def _contents(self, message):
        for tensor in message.inputs:
            field = self._of([f.name for f in pb.InferTensorContents.DESCRIPTOR.fields])
            value = {"bool": True, "fp32": 1e30, "fp64": -1e300, "byte": b"xy"}.get(field[:4], 300)
            getattr(tensor.contents, field).extend([value] * int(self._of([0, 1, 784, 1568])))
        if self._rng.random() < 0.7:
            del message.raw_input_contents[:]

    def _parameter(self, message):
        tensors = [*message.inputs, *message.outputs]
        parameters = self._of([message.parameters, *(tensor.parameters for tensor in tensors)])
        key = self._of(_KEYS)
        kind, value = self._of(
            [
                ("bool_param", True),
                ("int64_param", int(self._of(_NUMBERS))),
                ("string_param", self._of(_TEXTS)),
                ("double_param", float("nan")),
                ("uint64_param", 7),
            ]
        )
        if key == "timeout" and kind in ("int64_param", "uint64_param"):
            value = 10**9  # a short one is a deadline, which may pass: not what is looked for here
        setattr(parameters[key], kind, value)

    def _output(self, message):
        for _ in range(self._rng.integers(1, 3)):
            output = message.outputs.add(name=self._of(["logits", "probabilities", self._of(_TEXTS)]))
            if self._rng.random() < 0.5:
                output.parameters["classification"].int64_param = int(self._of(_NUMBERS))

    def _damage(self, data: bytes) -> bytes:
        if self._rng.random() < 0.5:
            return data[: self._rng.integers(0, len(data))]
        damaged = bytearray(data)
        for position in self._rng.integers(0, min(len(damaged), 80), 3):
            damaged[position] = self._rng.integers(256)
        return bytes(damaged)


def test_no_malformed_request_is_more_than_an_error(repository, sample, reference, caplog):
    """`FUZZED` requests, each of them wrong in some way or other, and the server answers as before."""
    images = sample[1].images.numpy()
    fuzzer = Fuzzer(images, seed=0)
    counts: dict[grpc.StatusCode, int] = {}

    async def scenario(address):
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary(INFER)
            left = FUZZED

            async def send():
                nonlocal left
                while left > 0:
                    left -= 1
                    data = fuzzer.request()
                    try:
                        pb.ModelInferResponse.FromString(await call(data, timeout=60))
                        code = grpc.StatusCode.OK
                    except grpc.aio.AioRpcError as error:
                        code = error.code()
                        if code not in EXPECTED:
                            pytest.fail(f"{code}: {error.details()} for {data!r}")
                    counts[code] = counts.get(code, 0) + 1

            await asyncio.gather(*(send() for _ in range(IN_FLIGHT)))
            right = pb.ModelInferResponse.FromString(await call(infer_request(images[:20])))
            assert logits(right).argmax(1).tolist() == reference[:20].argmax(1).tolist()

    with running(repository) as server:
        asyncio.run(scenario(server.address))
    assert sum(counts.values()) == FUZZED
    # The requests are near enough to right ones to reach every depth: some are answered, not all for the same reason.
    assert counts[grpc.StatusCode.OK] > FUZZED / 100
    assert counts[grpc.StatusCode.INVALID_ARGUMENT] > FUZZED / 4
    assert counts[grpc.StatusCode.NOT_FOUND] > FUZZED / 100
    assert not caplog.records


@pytest.mark.parametrize("name", [name for name, rpc in pb.RPCS.items() if not rpc.request_streaming])
def test_garbage_to_every_rpc_is_an_invalid_argument(served, name):
    with grpc.insecure_channel(served) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary(pb.RPCS[name].path)(b"\xff\xff\xff", timeout=10)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
