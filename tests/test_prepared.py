"""Requests that are answered from what is prepared get, byte for byte, what the full decoding gives."""

import grpc
import numpy as np
import pytest
from conftest import MODEL, running
from google.protobuf.message import DecodeError
from test_robustness import Fuzzer

from protos import open_inference as pb
from serving.services import prepared
from serving.services.prepared import PreparedRequests

INFER = pb.RPCS["ModelInfer"].path
STREAM = pb.RPCS["ModelStreamInfer"].path
MUTATIONS = 400


def message(images, request_id="", version="", outputs=("logits",)):
    request = pb.ModelInferRequest(model_name=MODEL, model_version=version, id=request_id)
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    for name in outputs:
        request.outputs.add(name=name)
    request.raw_input_contents.append(images.tobytes())
    return request.SerializeToString()


def outcomes(address, messages):
    """What comes of each message sent alone, and in one stream."""
    with grpc.insecure_channel(address) as channel:
        alone = channel.unary_unary(INFER)
        results = []
        for data in messages:
            try:
                results.append(alone(data, timeout=30))
            except grpc.RpcError as error:
                results.append((error.code(), error.details()))
        parsed = [data for data in messages if _is_message(data)]  # anything else ends the stream
        streamed = channel.stream_stream(STREAM)
        for data in parsed:  # one at a time: batches of other sizes round otherwise
            results.extend(streamed(iter([data]), timeout=30))
    return results


def _is_message(data):
    try:
        pb.ModelInferRequest.FromString(data)
    except DecodeError:
        return False
    return True


def mutated(images):
    """Messages that are like prepared ones, or nearly."""
    rng = np.random.default_rng(1)
    bases = [
        message(images[:1]),
        message(images[1:3], "one", "1", ("probabilities", "logits")),
        message(images[:1], "x" * 127, outputs=()),
        message(images[:1], "x" * 128),
        message(images[:1], "ü"),
    ]
    fuzzer = Fuzzer(images, seed=2)
    messages = [*bases, *bases]
    for _ in range(MUTATIONS):
        base = bytearray(bases[rng.integers(len(bases))])
        match rng.integers(6):
            case 0:  # another tensor
                base[-784:] = rng.bytes(784)
            case 1:  # a byte of what stands around it
                base[rng.integers(min(len(base), 200))] = rng.integers(256)
            case 2:  # something more, or less, somewhere
                position = rng.integers(len(base))
                base[position : position + rng.integers(3)] = rng.bytes(int(rng.integers(3)))
            case 3:  # fields once more, behind the tensor
                base += pb.ModelInferRequest(id="late", model_name=MODEL).SerializeToString()
            case 4:
                base = bytearray(message(images[:1], "y" * int(rng.integers(200))))
            case 5:
                base = bytearray(fuzzer.request())
        messages.append(bytes(base))
    return messages


def test_prepared_requests_are_answered_as_in_full(repository, sample, monkeypatch):
    messages = mutated(sample[1].images.numpy())
    hits = []
    submit = PreparedRequests.submit

    def counted(*arguments):
        running = submit(*arguments)
        hits.append(running is not None)
        return running

    with running(repository) as server:
        monkeypatch.setattr(PreparedRequests, "submit", lambda *_: None)
        wanted = outcomes(server.address, messages)
        monkeypatch.setattr(PreparedRequests, "submit", counted)
        got = outcomes(server.address, messages)
    for data, want, have in zip([*messages, *filter(_is_message, messages)], wanted, got, strict=True):
        assert have == want, data
    assert sum(hits) > len(messages) / 4  # it was the prepared ones that were compared
    assert not all(hits)


def test_another_version_is_never_answered_from_what_an_older_one_taught(tampered, sample):
    images = sample[1].images.numpy()
    with (
        running(tampered, model_control="explicit", models=(MODEL,)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        infer = channel.unary_unary(INFER, response_deserializer=pb.ModelInferResponse.FromString)
        for _ in range(2):
            assert infer(message(images[:1])).model_version == "1"
        unload = channel.unary_unary(pb.RPCS["RepositoryModelUnload"].path)
        unload(pb.RepositoryModelUnloadRequest(model_name=MODEL).SerializeToString())
        with pytest.raises(grpc.RpcError, match="has no available versions"):
            infer(message(images[:1]))


def test_what_is_prepared_is_bounded(repository, sample, monkeypatch):
    images = sample[1].images.numpy()
    monkeypatch.setattr(prepared, "_MAX_PREPARED", 3)
    seen = []
    learn = PreparedRequests.learn

    def counted(self, *arguments):
        learn(self, *arguments)
        seen.append(len(self._prepared))

    monkeypatch.setattr(PreparedRequests, "learn", counted)
    with running(repository) as server, grpc.insecure_channel(server.address) as channel:
        infer = channel.unary_unary(INFER)
        for count in range(1, 9):
            infer(message(images[:count]))
    assert seen == [1, 2, 3, 1, 2, 3, 1, 2]
