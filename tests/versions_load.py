"""Versions that are told apart by their answers, and clients that keep asking and check every answer."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import onnx
from conftest import MODEL, edit_manifest, rehash
from onnx import numpy_helper

from protos import classifier_pb2, classifier_pb2_grpc
from protos import open_inference as pb
from serving.bundle import GOLDEN, ONNX, Bundle, open_bundle
from serving.parity import softmax

PATIENCE_S = 60.0


def publish(source: Path, repository: Path, number: int, damage: Callable[[Path], object] | None = None) -> Path:
    """Give a repository a version whose logits are those of `source`'s model and `shift(number)`; by one rename.

    Args:
        source: a version's folder.
        repository: where to.
        number: the version.
        damage: done to the folder before it appears.
    """
    draft = repository / MODEL / f".draft-{number}"
    shutil.copytree(source, draft)
    model = onnx.load(draft / ONNX)
    (bias,) = (init for init in model.graph.initializer if list(init.dims) == [10])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + shift(number), bias.name))
    onnx.save(model, draft / ONNX)
    image, logits = open_bundle(source).golden()
    np.savez(draft / GOLDEN, image=image, logits=logits + shift(number))
    for name in (ONNX, GOLDEN):
        rehash(draft, name)
    edit_manifest(draft, version=number)
    if damage:
        damage(draft)
    return draft.rename(repository / MODEL / str(number))


def shift(number: int) -> np.ndarray:
    """What `publish` adds to the logits, float32 [10]; of every number another."""
    added = np.zeros(10, np.float32)
    added[number % 10] = 1 + number // 10
    return added


class Clients:
    """Clients that ask for the newest version, several requests in flight, and check each answer's every row.

    `failures` has what was not answered or not by exactly the version that the answer names.
    """

    def __init__(self, address: str, source: Bundle) -> None:
        self._address = address
        self._images, self._logits = source.golden()
        self.failures: list[str] = []
        self.answered: Counter[str] = Counter()  # by version
        self._changed = threading.Condition()
        self._rng = np.random.default_rng(0)
        self._stopping = False
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Clients:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping = True
        self._thread.join()

    def wait_for(self, version: int, answers: int = 1) -> None:
        """Until so many more answers came from a version; whatever failed meanwhile is an error at once."""
        with self._changed:
            wanted = self.answered[str(version)] + answers
            done = self._changed.wait_for(
                lambda: self.failures or self.answered[str(version)] >= wanted, timeout=PATIENCE_S
            )
        assert not self.failures
        assert done, f"version {version} did not answer in {PATIENCE_S} s: {self.answered}"

    def _work(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception as error:
            self._note("", f"the clients stopped: {error!r}")

    async def _run(self) -> None:
        async with grpc.aio.insecure_channel(self._address) as channel:
            await asyncio.gather(
                *(self._unary(channel) for _ in range(6)), self._streamed(channel), self._predicting(channel)
            )

    async def _unary(self, channel: grpc.aio.Channel) -> None:
        call = channel.unary_unary(pb.RPCS["ModelInfer"].path)
        while not self._stopping:
            rows = self._pick()
            try:
                self._check(rows, pb.ModelInferResponse.FromString(await call(self._request(rows), timeout=PATIENCE_S)))
            except grpc.aio.AioRpcError as error:
                self._note("", f"{error.code()}: {error.details()}")

    async def _streamed(self, channel: grpc.aio.Channel) -> None:
        stream = channel.stream_stream(pb.RPCS["ModelStreamInfer"].path)()
        picks = [self._pick() for _ in range(4)]
        for rows in picks:
            await stream.write(self._request(rows))
        while picks:
            answer = pb.ModelStreamInferResponse.FromString(await stream.read())
            if answer.error_message:
                self._note("", answer.error_message)
            else:
                self._check(picks[0], answer.infer_response)
            picks.pop(0)
            if not self._stopping:
                picks.append(self._pick())
                await stream.write(self._request(picks[-1]))
        await stream.done_writing()

    async def _predicting(self, channel: grpc.aio.Channel) -> None:
        stub = classifier_pb2_grpc.ClassifierStub(channel)
        while not self._stopping:
            rows = self._pick()
            raw = classifier_pb2.RawImages(pixels=self._images[rows].tobytes())
            try:
                answer = await stub.Predict(classifier_pb2.PredictRequest(model=MODEL, raw=raw, top_k=10))
            except grpc.aio.AioRpcError as error:
                self._note("", f"{error.code()}: {error.details()}")
                continue
            scores = [sorted((s.class_id, s.probability) for s in p.top_k) for p in answer.predictions]
            got = np.array([[probability for _, probability in row] for row in scores])
            self._compare(answer.version, got, softmax(self._want(rows, answer.version)))

    def _pick(self) -> np.ndarray:
        return self._rng.integers(0, len(self._images), self._rng.integers(1, 6))

    def _request(self, rows: np.ndarray) -> bytes:
        images = self._images[rows]
        request = pb.ModelInferRequest(model_name=MODEL)
        request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
        request.raw_input_contents.append(images.tobytes())
        return request.SerializeToString()

    def _check(self, rows: np.ndarray, answer: pb.ModelInferResponse) -> None:
        got = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(-1, 10)
        self._compare(answer.model_version, got, self._want(rows, answer.model_version))

    def _want(self, rows: np.ndarray, version: str) -> np.ndarray:
        return self._logits[rows] + shift(int(version))

    def _compare(self, version: str, got: np.ndarray, want: np.ndarray) -> None:
        right = got.shape == want.shape and np.allclose(got, want, atol=1e-3, rtol=0)
        self._note(version, "" if right else f"version {version} answered {got}, want {want}")

    def _note(self, version: str, failure: str) -> None:
        with self._changed:
            if failure:
                self.failures.append(failure)
            else:
                self.answered[version] += 1
            self._changed.notify_all()
