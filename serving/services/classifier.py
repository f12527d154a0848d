"""`classifier.v1.Classifier`: images in, labels and probabilities out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
import numpy.typing as npt

from protos import classifier_pb2 as pb
from serving import errors, images
from serving.bundle import Manifest
from serving.config import ServerConfig
from serving.errors import InvalidArgument
from serving.repository import Repository, ServedModel, State, Status
from serving.services import Context, deadline, in_order
from serving.tensors import Array, TensorSpec, shape_text

_STATES = {
    State.LOADING: pb.Model.STATE_LOADING,
    State.READY: pb.Model.STATE_READY,
    State.UNAVAILABLE: pb.Model.STATE_UNAVAILABLE,
}


class ClassifierService:
    """The servicer; see `protos/classifier.proto` for what each method promises."""

    def __init__(self, repository: Repository, config: ServerConfig) -> None:
        self._repository = repository
        self._config = config

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Classify one batch."""
        return await self._predict(request, deadline(context))

    async def PredictStream(
        self, requests: AsyncIterator[pb.PredictRequest], context: Context
    ) -> AsyncIterator[pb.PredictStreamResponse]:
        """Classify many batches: concurrently, answered in order, an error in its request's place."""
        until = deadline(context)
        async for response in in_order(requests, lambda request: self._predict_or_error(request, until)):
            yield response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Every model, ready or not."""
        return pb.ListModelsResponse(models=[_describe(status) for status in self._repository.statuses()])

    async def _predict_or_error(self, request: pb.PredictRequest, deadline: float | None) -> pb.PredictStreamResponse:
        try:
            return pb.PredictStreamResponse(response=await self._predict(request, deadline))
        except Exception as error:
            code, details = errors.to_status(error)
            return pb.PredictStreamResponse(error=pb.Error(id=request.id, code=code.value[0], message=details))

    async def _predict(self, request: pb.PredictRequest, until: float | None) -> pb.PredictResponse:
        start_ns = time.monotonic_ns()
        served = self._repository.get(request.model or self._repository.only_model(), request.version)
        try:
            manifest = _classifier(served)
            top_k = _top_k(request.top_k, len(manifest.labels))
            batch = await self._images(request, manifest.inputs[0])
            answer = await served.scheduler.infer({manifest.inputs[0].name: batch}, until)
            response = _response(request.id, served, manifest, answer.outputs["probabilities"], top_k)
        except BaseException:
            served.statistics.failed(start_ns)
            raise
        served.statistics.succeeded(start_ns, answer.stages)
        return response

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


def _classifier(served: ServedModel) -> Manifest:
    """The manifest of an image classifier; a model without one has no labels to answer with."""
    if served.manifest is None:
        raise InvalidArgument(f"model {served.name} is no classifier of ours; ask it by the Open Inference Protocol")
    return served.manifest


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


def _response(
    request_id: str, served: ServedModel, manifest: Manifest, probabilities: Array, top_k: int
) -> pb.PredictResponse:
    backend = served.backend
    # Best first; among equals the lower class id, as argmax has it.
    order = np.argsort(np.negative(probabilities), axis=1, kind="stable")[:, :top_k]
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
        backend, manifest, golden = status.served.backend, status.served.manifest, status.served.golden
        model.backend, model.provider, model.device = backend.name, backend.provider, backend.device
        if manifest and golden:
            model.verified = True
            model.dataset = manifest.dataset
            model.labels.extend(manifest.labels)
            model.test_accuracy, model.test_images = manifest.test_accuracy.value, manifest.test_accuracy.n
            model.golden_max_abs = golden.max_abs
    return model
