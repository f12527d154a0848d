"""`classifier.v1.Classifier`: images in, labels and probabilities out."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from protos import classifier_pb2 as pb
from serving import images, logs
from serving.bundle import Manifest
from serving.config import ServerConfig
from serving.errors import InvalidArgument, QueueFull
from serving.repository import Repository, ServedModel, State, Status
from serving.services import Context, Pending, ask, in_order
from serving.services.statuses import to_status
from serving.statistics import Rpcs, Stages
from serving.tensors import Array, TensorSpec, shape_text

DECODERS = 2  # threads that decode pictures; each needs a few bytes for every pixel of --max-image-pixels

_STREAM = f"{pb.DESCRIPTOR.services_by_name['Classifier'].full_name}/PredictStream"

_STATES = {
    State.LOADING: pb.Model.STATE_LOADING,
    State.READY: pb.Model.STATE_READY,
    State.UNLOADING: pb.Model.STATE_UNLOADING,
    State.UNAVAILABLE: pb.Model.STATE_UNAVAILABLE,
}


class ClassifierService:
    """The servicer; see `protos/classifier.proto` for what each method promises."""

    def __init__(self, repository: Repository, config: ServerConfig, rpcs: Rpcs) -> None:
        self._repository = repository
        self._config = config
        self._rpcs = rpcs
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._decoding = 0  # requests whose pictures wait or are decoded

    def close(self) -> None:
        """Let the pictures that are being decoded finish, and forget those that wait."""
        self._decoders.shutdown(cancel_futures=True)

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:
        """Classify one batch."""
        return await self._predict(request, context.deadline_ns)

    async def PredictStream(
        self, requests: AsyncIterator[pb.PredictRequest], context: Context
    ) -> AsyncIterator[pb.PredictStreamResponse]:
        """Classify many batches: concurrently, answered in order, an error in its request's place."""
        until = context.deadline_ns

        def begin(request: pb.PredictRequest) -> Pending[pb.PredictStreamResponse]:
            return asyncio.create_task(self._predict_or_error(request, until))

        async for response in in_order(requests, begin):
            yield response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        """Every version of every model, ready or not."""
        return pb.ListModelsResponse(models=[_describe(status) for status in self._repository.statuses()])

    async def _predict_or_error(self, request: pb.PredictRequest, until: float) -> pb.PredictStreamResponse:
        try:
            return pb.PredictStreamResponse(response=await self._predict(request, until))
        except Exception as error:
            code, details = to_status(error, lambda: logs.about(_STREAM, "", (), request.id))
            self._rpcs.stream_error(_STREAM, code.name)
            return pb.PredictStreamResponse(error=pb.Error(id=request.id, code=code.value[0], message=details))

    async def _predict(self, request: pb.PredictRequest, until: float) -> pb.PredictResponse:
        async def question(served: ServedModel) -> tuple[pb.PredictResponse, Stages]:
            manifest = _classifier(served)
            top_k = _top_k(request.top_k, len(manifest.labels))
            batch = await self._images(request, served, manifest.inputs[0])
            answer = await served.scheduler.infer({manifest.inputs[0].name: batch}, until)
            return _response(request.id, served, manifest, answer.outputs["probabilities"], top_k), answer

        return await ask(self._repository, request.model or self._repository.only_model(), request.version, question)

    async def _images(self, request: pb.PredictRequest, served: ServedModel, spec: TensorSpec) -> npt.NDArray[np.uint8]:
        """The request's images as the model's input tensor."""
        match request.WhichOneof("input"):
            case "raw":
                batch = _raw(request.raw, spec)
                self._check_batch(len(batch))
                return batch
            case "encoded":
                encoded = request.encoded
                self._check_batch(len(encoded.images))
                if self._decoding >= self._config.max_queue:
                    served.statistics.dropped("queue_full")
                    raise QueueFull(f"{self._decoding} requests with pictures wait already, the queue holds no more")
                self._decoding += 1
                try:
                    decode = functools.partial(self._decode, list(encoded.images), encoded.polarity, spec)
                    return await asyncio.get_running_loop().run_in_executor(self._decoders, decode)
                finally:
                    self._decoding -= 1
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
        left = self._config.max_image_pixels
        for index, data in enumerate(encoded):
            try:
                pixels, size = images.decode(data, height, width, wanted, left)
            except InvalidArgument as error:
                raise InvalidArgument(f"encoded.images[{index}]: {error}") from error
            decoded.append(pixels)
            left -= size
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
        model=served.name,
        version=served.version,
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
    model.version_labels.extend(status.labels)
    if status.served:
        backend, manifest, golden = status.served.backend, status.served.manifest, status.served.golden
        model.backend, model.provider, model.device = backend.name, backend.provider, backend.device
        model.file = backend.file
        model.settings.update(backend.settings)
        model.verified = status.served.verified
        if manifest and golden:
            model.precision = manifest.artefacts()[backend.file][1]
            model.dataset = manifest.dataset
            model.labels.extend(manifest.labels)
            model.test_accuracy, model.test_images = manifest.test_accuracy.value, manifest.test_accuracy.n
            model.golden_max_abs = golden.max_abs
    return model
