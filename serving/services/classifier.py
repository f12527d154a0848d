"""`classifier.v1.Classifier`: images in, labels and probabilities out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from protos import classifier_pb2 as pb
from protos import classifier_pb2_grpc
from serving import errors, images
from serving.bundle import Manifest
from serving.config import ServerConfig
from serving.errors import InvalidArgument
from serving.repository import Repository, ServedModel, State, Status
from serving.tensors import TensorSpec, shape_text

Context = grpc.aio.ServicerContext[Any, Any]

STREAM_IN_FLIGHT = 64  # requests of one stream that run at once; a client that sends more waits

_STATES = {
    State.LOADING: pb.Model.STATE_LOADING,
    State.READY: pb.Model.STATE_READY,
    State.UNAVAILABLE: pb.Model.STATE_UNAVAILABLE,
}


class ClassifierService(classifier_pb2_grpc.ClassifierServicer):
    """The servicer; see `protos/classifier.proto` for what each method promises."""

    def __init__(self, repository: Repository, config: ServerConfig) -> None:
        self._repository = repository
        self._config = config

    @errors.unary
    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Classify one batch."""
        return await self._predict(request, _deadline(context))

    @errors.stream
    async def PredictStream(
        self, requests: AsyncIterator[pb.PredictRequest], context: Context
    ) -> AsyncIterator[pb.PredictStreamResponse]:
        """Classify many batches: concurrently, answered in order, an error in its request's place."""
        running: asyncio.Queue[asyncio.Task[pb.PredictStreamResponse] | None] = asyncio.Queue(STREAM_IN_FLIGHT)
        deadline = _deadline(context)

        async def read() -> None:
            try:
                async for request in requests:
                    await running.put(asyncio.create_task(self._predict_or_error(request, deadline)))
            finally:
                await running.put(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await running.get()) is not None:
                yield await task
            await reader
        finally:  # the client may have gone: nobody waits for the rest
            reader.cancel()
            while not running.empty():
                if (task := running.get_nowait()) is not None:
                    task.cancel()

    @errors.unary
    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: ARG002
        """Every model, ready or not."""
        return pb.ListModelsResponse(models=[_describe(status) for status in self._repository.statuses()])

    async def _predict_or_error(self, request: pb.PredictRequest, deadline: float | None) -> pb.PredictStreamResponse:
        try:
            return pb.PredictStreamResponse(response=await self._predict(request, deadline))
        except Exception as error:
            code, details = errors.to_status(error)
            return pb.PredictStreamResponse(error=pb.Error(id=request.id, code=code.value[0], message=details))

    async def _predict(self, request: pb.PredictRequest, deadline: float | None) -> pb.PredictResponse:
        served = self._repository.get(request.model, request.version)
        manifest = served.manifest
        top_k = _top_k(request.top_k, len(manifest.labels))
        batch = await self._images(request, manifest.inputs[0])
        outputs = await served.scheduler.infer({manifest.inputs[0].name: batch}, deadline)
        return _response(request.id, served, outputs["probabilities"], top_k)

    async def _images(self, request: pb.PredictRequest, spec: TensorSpec) -> npt.NDArray[np.uint8]:
        """The request's images as the model's input tensor."""
        match request.WhichOneof("input"):
            case "raw":
                batch = _raw(request.raw, spec)
                self._check_batch(len(batch))
                return batch
            case "encoded":
                encoded = request.encoded
                self._check_batch(len(encoded.images))
                return await asyncio.to_thread(self._decode, list(encoded.images), encoded.polarity, spec)
        raise InvalidArgument("input: got none, want raw or encoded images")

    def _check_batch(self, size: int) -> None:
        if not 1 <= size <= self._config.max_batch_size:
            raise InvalidArgument(
                f"batch: got {size} images, want 1 to {self._config.max_batch_size} (--max-batch-size)"
            )

    def _decode(self, encoded: list[bytes], polarity: int, spec: TensorSpec) -> npt.NDArray[np.uint8]:
        try:
            wanted = images.Polarity(polarity)
        except ValueError as error:
            raise InvalidArgument(f"encoded.polarity: got {polarity}, want 0, 1 or 2") from error
        height, width = (axis for axis in spec.shape[-2:] if isinstance(axis, int))
        decoded = []
        for index, data in enumerate(encoded):
            try:
                decoded.append(images.decode(data, height, width, wanted, self._config.max_image_pixels))
            except InvalidArgument as error:
                raise InvalidArgument(f"encoded.images[{index}]: {error}") from error
        return np.stack(decoded)


def _deadline(context: Context) -> float | None:
    """When the caller stops waiting, in `time.monotonic()` seconds."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _top_k(asked: int, classes: int) -> int:
    if asked > classes:
        raise InvalidArgument(f"top_k: got {asked}, want at most {classes}, the number of classes")
    return max(1, asked)


def _raw(raw: pb.RawImages, spec: TensorSpec) -> npt.NDArray[np.uint8]:
    """Raw pixels as the model's input tensor, without a copy."""
    image_shape = tuple(axis for axis in spec.shape[1:] if isinstance(axis, int))
    image_bytes = int(np.prod(image_shape)) * spec.dtype.itemsize
    shape = tuple(raw.shape) or (len(raw.pixels) // image_bytes, *image_shape)
    if not raw.pixels or (not raw.shape and len(raw.pixels) % image_bytes):
        raise InvalidArgument(f"raw.pixels: got {len(raw.pixels)} bytes, want {image_bytes} for each image")
    if not spec.accepts(shape):
        raise InvalidArgument(f"{spec.name}: got shape {shape_text(shape)}, want {spec.shape_text()}")
    if len(raw.pixels) != shape[0] * image_bytes:
        raise InvalidArgument(
            f"raw.pixels: got {len(raw.pixels)} bytes, want {shape[0] * image_bytes} for shape {shape_text(shape)}"
        )
    return np.frombuffer(raw.pixels, dtype=np.uint8).reshape(shape)


def _response(request_id: str, served: ServedModel, probabilities: Any, top_k: int) -> pb.PredictResponse:
    manifest, backend = served.manifest, served.backend
    # Best first; among equals the lower class id, as argmax has it.
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    predictions = [
        _prediction(manifest, classes, scores)
        for classes, scores in zip(order.tolist(), np.take_along_axis(probabilities, order, 1).tolist(), strict=True)
    ]
    return pb.PredictResponse(
        predictions=predictions,
        model=manifest.model,
        version=str(manifest.version),
        backend=backend.name,
        provider=backend.provider,
        device=backend.device,
        id=request_id,
    )


def _prediction(manifest: Manifest, classes: list[int], scores: list[float]) -> pb.Prediction:
    ranked = [
        pb.ClassScore(label=manifest.labels[class_id], class_id=class_id, probability=score)
        for class_id, score in zip(classes, scores, strict=True)
    ]
    best = ranked[0]
    return pb.Prediction(label=best.label, class_id=best.class_id, probability=best.probability, top_k=ranked)


def _describe(status: Status) -> pb.Model:
    model = pb.Model(name=status.name, version=status.version, state=_STATES[status.state], reason=status.reason)
    if status.served:
        manifest, backend = status.served.manifest, status.served.backend
        model.dataset = manifest.dataset
        model.labels.extend(manifest.labels)
        model.backend, model.provider, model.device = backend.name, backend.provider, backend.device
        model.test_accuracy, model.test_images = manifest.test_accuracy.value, manifest.test_accuracy.n
        model.golden_max_abs = status.served.golden.max_abs
    return model
