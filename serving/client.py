"""A typed client of `classifier.v1.Classifier`, synchronous and asyncio.

    with Client("127.0.0.1:8001") as client:
        for prediction in client.predict(["seven.png", "photo.jpg"]).predictions:
            print(prediction.label, prediction.probability)

Images are numpy arrays of uint8 pixels as the network takes them (light on dark), or pictures of any size: paths,
encoded bytes, PIL images. An UNAVAILABLE server is tried again with growing pauses; other errors are raised as the
`RequestError` that the server raised.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from PIL import Image

from protos import classifier_pb2 as pb
from protos import classifier_pb2_grpc
from serving.config import DEFAULT_TARGET, MAX_MESSAGE_BYTES
from serving.credentials import Credentials
from serving.errors import InvalidArgument, ParityserveError, Unavailable, from_status
from serving.images import Polarity

ImageLike = npt.NDArray[np.uint8] | Image.Image | str | os.PathLike[str] | bytes

DEFAULT_TIMEOUT_S = 30.0
NO_CREDENTIALS = Credentials()

_CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # Each client has a connection of its own: by default all in a process share one, and a server of several workers
    # answers all that comes over one connection with one of them.
    ("grpc.use_local_subchannel_pool", 1),
    # A request is kept until it is answered: by default one of more than 256 KiB would not be tried again.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    # https://github.com/grpc/grpc/blob/master/doc/service_config.md
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{"service": "classifier.v1.Classifier"}],
                        "retryPolicy": {
                            "maxAttempts": 5,
                            "initialBackoff": "0.2s",
                            "maxBackoff": "2s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ]
            }
        ),
    ),
]


@dataclass(frozen=True)
class ClassScore:
    """One class and its probability, 0 to 1."""

    label: str
    class_id: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: its most probable class, and `top_k`, best first."""

    label: str
    class_id: int
    probability: float
    top_k: tuple[ClassScore, ...]


@dataclass(frozen=True)
class PredictResult:
    """The answer for a batch, and what answered."""

    predictions: tuple[Prediction, ...]
    model: str
    version: str
    backend: str
    provider: str
    device: str


@dataclass(frozen=True)
class ModelInfo:
    """What a server says of one model."""

    name: str
    version: str
    state: str  # READY, LOADING, UNLOADING, UNAVAILABLE
    reason: str
    dataset: str
    labels: tuple[str, ...]
    backend: str
    provider: str
    device: str
    test_accuracy: float
    test_images: int
    golden_max_abs: float
    verified: bool  # False for a plain ONNX file, of which the rest is unknown, and where `--golden warn` let it pass
    file: str
    precision: str
    settings: Mapping[str, str]  # what else is in force of how the file is run
    version_labels: tuple[str, ...]  # that mean this version


def predict_request(
    images: ImageLike | Sequence[ImageLike],
    model: str = "",
    version: str | int = "",
    top_k: int = 1,
    polarity: Polarity = Polarity.AUTO,
) -> pb.PredictRequest:
    """The request for one image or a sequence of them.

    Args:
        images: uint8 arrays [28,28], [1,28,28] or a whole batch [N,28,28] or [N,1,28,28]; or pictures. Arrays and
            pictures do not mix in one request.
        model: its name; may be empty when the server has one.
        version: a number, as text or not, or a label; `stable`, or where there is no such label the newest, when empty.
        top_k: how many classes to list for each image, from 1 up.
        polarity: of pictures; arrays are light on dark.

    Raises:
        InvalidArgument: no image, an array of another dtype or shape, arrays mixed with pictures, or a wrong `top_k`.
        OSError: a file cannot be read.
    """
    if not 0 < top_k < 2**31:
        raise InvalidArgument(f"top_k: got {top_k}, want a whole number from 1 up")
    request = pb.PredictRequest(model=model, version=str(version), top_k=top_k)
    if isinstance(images, np.ndarray | Image.Image | str | os.PathLike | bytes):
        images = [images]
    items: list[Any] = list(images)
    if not items:
        raise InvalidArgument("images: got none")
    arrays = [isinstance(item, np.ndarray) for item in items]
    if all(arrays):
        batch = np.concatenate([_batch(item) for item in items])
        request.raw.pixels = batch.tobytes()
        request.raw.shape.extend(batch.shape)
    elif any(arrays):
        raise InvalidArgument("images: got arrays and pictures together, want one kind in a request")
    else:
        name = pb.Polarity.Name(polarity.value)
        request.encoded.CopyFrom(pb.EncodedImages(images=[_encoded(item) for item in items], polarity=name))
    return request


def _batch(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """An array as [N,1,height,width]."""
    if array.dtype != np.uint8:
        raise InvalidArgument(f"image: got dtype {array.dtype}, want uint8 pixels from 0 to 255")
    if array.ndim == 2:
        return array[np.newaxis, np.newaxis]
    if array.ndim == 3:
        return array[:, np.newaxis]
    if array.ndim == 4:
        return array
    raise InvalidArgument(f"image: got shape {list(array.shape)}, want [28,28], [N,28,28] or [N,1,28,28]")


def _encoded(item: Image.Image | str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, Image.Image):
        buffer = io.BytesIO()
        item.save(buffer, format="PNG")
        return buffer.getvalue()
    return Path(item).read_bytes()


def _result(response: pb.PredictResponse) -> PredictResult:
    predictions = tuple(
        Prediction(
            label=p.label,
            class_id=p.class_id,
            probability=p.probability,
            top_k=tuple(ClassScore(c.label, c.class_id, c.probability) for c in p.top_k),
        )
        for p in response.predictions
    )
    return PredictResult(
        predictions, response.model, response.version, response.backend, response.provider, response.device
    )


def _stream_result(answer: pb.PredictStreamResponse) -> PredictResult | ParityserveError:
    if answer.WhichOneof("result") == "response":
        return _result(answer.response)
    status = next(code for code in grpc.StatusCode if code.value[0] == answer.error.code)
    return from_status(status, answer.error.message)


def _models(response: pb.ListModelsResponse) -> list[ModelInfo]:
    return [
        ModelInfo(
            name=m.name,
            version=m.version,
            state=pb.Model.State.Name(m.state).removeprefix("STATE_"),
            reason=m.reason,
            dataset=m.dataset,
            labels=tuple(m.labels),
            backend=m.backend,
            provider=m.provider,
            device=m.device,
            test_accuracy=m.test_accuracy,
            test_images=m.test_images,
            golden_max_abs=m.golden_max_abs,
            verified=m.verified,
            file=m.file,
            precision=m.precision,
            settings=dict(m.settings),
            version_labels=tuple(m.version_labels),
        )
        for m in response.models
    ]


def _error(target: str, error: grpc.RpcError) -> ParityserveError:
    ours = from_status(error.code(), error.details() or "")
    if not isinstance(ours, Unavailable):
        return ours
    if "failed to connect" in str(ours):  # gRPC's words
        return Unavailable(f"{target}: no server answers there; start one with python -m serving serve ({ours})")
    return Unavailable(f"{target}: {ours}")


def open_channel(target: str, credentials: Credentials) -> grpc.Channel:
    """A connection of its own to `target`, host:port; `Client` has what it raises."""
    secure = credentials.channel()
    if secure:
        return grpc.secure_channel(target, secure, _CHANNEL_OPTIONS)
    return grpc.insecure_channel(target, _CHANNEL_OPTIONS)


class Client:
    """A synchronous client; close it, or use it as a context manager."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        """Connect to `target`, host:port, at the first call. A call fails after `timeout_s` seconds, a stream never.

        Raises:
            InvalidArgument: the credentials are incomplete, or a token would be sent unencrypted.
            OSError: a file of theirs cannot be read.
        """
        self._target = target
        self._timeout_s = timeout_s
        self._metadata = credentials.metadata(target)
        self._channel = open_channel(target, credentials)
        self._stub = classifier_pb2_grpc.ClassifierStub(self._channel)

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        model: str = "",
        version: str | int = "",
        top_k: int = 1,
        polarity: Polarity = Polarity.AUTO,
    ) -> PredictResult:
        """Classify images; see `predict_request` for the arguments.

        Raises:
            RequestError: what the server refused, or Unavailable after the last try.
            OSError: a file cannot be read.
        """
        request = predict_request(images, model, version, top_k, polarity)
        try:
            return _result(self._stub.Predict(request, timeout=self._timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _error(self._target, error) from error

    def predict_stream(self, requests: Iterable[pb.PredictRequest]) -> Iterator[PredictResult | ParityserveError]:
        """Classify many requests over one stream; an error stands in the place of the request that it answers."""
        try:
            for answer in self._stub.PredictStream(iter(requests), metadata=self._metadata):
                yield _stream_result(answer)
        except grpc.RpcError as error:
            raise _error(self._target, error) from error

    def list_models(self) -> list[ModelInfo]:
        """Every model that the server knows, ready or not."""
        try:
            return _models(
                self._stub.ListModels(pb.ListModelsRequest(), timeout=self._timeout_s, metadata=self._metadata)
            )
        except grpc.RpcError as error:
            raise _error(self._target, error) from error

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """The same client for asyncio."""

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        """As `Client`; to be created in a running event loop."""
        self._target = target
        self._timeout_s = timeout_s
        self._metadata = credentials.metadata(target)
        secure = credentials.channel()
        self._channel = (
            grpc.aio.secure_channel(target, secure, _CHANNEL_OPTIONS)
            if secure
            else grpc.aio.insecure_channel(target, _CHANNEL_OPTIONS)
        )
        self._stub = classifier_pb2_grpc.ClassifierStub(self._channel)

    async def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        model: str = "",
        version: str | int = "",
        top_k: int = 1,
        polarity: Polarity = Polarity.AUTO,
    ) -> PredictResult:
        """As `Client.predict`."""
        request = predict_request(images, model, version, top_k, polarity)
        try:
            return _result(await self._stub.Predict(request, timeout=self._timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _error(self._target, error) from error

    async def predict_stream(
        self, requests: AsyncIterator[pb.PredictRequest]
    ) -> AsyncIterator[PredictResult | ParityserveError]:
        """As `Client.predict_stream`."""
        try:
            async for answer in self._stub.PredictStream(requests, metadata=self._metadata):
                yield _stream_result(answer)
        except grpc.RpcError as error:
            raise _error(self._target, error) from error

    async def list_models(self) -> list[ModelInfo]:
        """As `Client.list_models`."""
        try:
            return _models(
                await self._stub.ListModels(pb.ListModelsRequest(), timeout=self._timeout_s, metadata=self._metadata)
            )
        except grpc.RpcError as error:
            raise _error(self._target, error) from error

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
