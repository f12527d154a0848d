"""Servers that break one rule each, and the checks that must report them."""

from __future__ import annotations

import grpc
import numpy as np
from conformance_fake import MODEL, OUTPUTS, Fake
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2

from protos import open_inference as pb
from serving import wire
from serving.errors import InvalidArgument, NotFound, RequestError


class Dead(Fake):
    def ServerLive(self, request):
        return pb.ServerLiveResponse()


class NotReady(Fake):
    def ServerReady(self, request):
        return pb.ServerReadyResponse()


class Nameless(Fake):
    def ServerMetadata(self, request):
        return pb.ServerMetadataResponse(version="1.0", extensions=self.extensions)


class ModelNeverReady(Fake):
    def ModelReady(self, request):
        return pb.ModelReadyResponse()


class EverythingReady(Fake):
    def ModelReady(self, request):
        return pb.ModelReadyResponse(ready=True)


class ChangesMetadata(Fake):
    """What `change` does to the metadata of a model that is right."""

    def ModelMetadata(self, request):
        answer = super().ModelMetadata(request)
        self.change(answer)
        return answer


class RenamesTheModel(ChangesMetadata):
    def change(self, answer):
        answer.name = "other"


class HidesVersions(ChangesMetadata):
    def change(self, answer):
        answer.versions[:] = ["2"]


class NamesItsOwnDatatype(ChangesMetadata):
    def change(self, answer):
        answer.outputs[0].datatype = "FLOAT"


class ShapesWithMinusTwo(ChangesMetadata):
    def change(self, answer):
        answer.outputs[1].shape[1] = -2


class AnyModelHasMetadata(Fake):
    def ModelMetadata(self, request):
        return super().ModelMetadata(pb.ModelMetadataRequest(name=MODEL))


class AnswersNothing(Fake):
    def ModelInfer(self, request):
        raise InvalidArgument("no")


class ChangesAnswers(Fake):
    """What `change` does to an answer that is right."""

    def ModelInfer(self, request):
        answer = super().ModelInfer(request)
        self.change(answer, request)
        return answer


class LosesIds(ChangesAnswers):
    def change(self, answer, request):
        answer.id = ""


class AsciiIds(ChangesAnswers):
    def change(self, answer, request):
        answer.id = request.id.encode("ascii", "replace").decode()


class NamesAnotherModel(ChangesAnswers):
    def change(self, answer, request):
        answer.model_name = "other"


class EchoesTheVersion(ChangesAnswers):
    def change(self, answer, request):
        answer.model_version = request.model_version


class OneVersionOnly(Fake):
    def ModelInfer(self, request):
        if request.model_version:
            raise NotFound("versions are not supported")
        return super().ModelInfer(request)


class ContentsBesideRaw(ChangesAnswers):
    def change(self, answer, request):
        for tensor in answer.outputs:
            tensor.contents.SetInParent()


class FlatOutputs(ChangesAnswers):
    def change(self, answer, request):
        for tensor in answer.outputs:
            if tensor.datatype != "BYTES":
                tensor.shape[:] = [tensor.shape[0] * tensor.shape[1]]


class AllOutputsAlways(Fake):
    def requested(self, request):
        del request.outputs[1:]
        return wire.requested_outputs(pb.ModelInferRequest(), OUTPUTS)


class FirstOutputByDefault(Fake):
    def requested(self, request):
        return super().requested(request) if request.outputs else super().requested(request)[:1]


class ItsOwnOrder(Fake):
    def requested(self, request):
        return sorted(super().requested(request), key=lambda wanted: wanted.name)


class ElementsInTheWrongOrder(ChangesAnswers):
    def change(self, answer, request):
        if len(request.outputs) > 1:
            last, first = answer.outputs
            last.name, last.shape[1] = first.name, first.shape[1]
            last.datatype, first.datatype = first.datatype, last.datatype
            first.name, first.shape[1] = "text", 1


class IgnoresTypedContents(Fake):
    def decode(self, request):
        arrays = super().decode(request)
        return arrays if request.raw_input_contents else {name: array[:0] for name, array in arrays.items()}


class TurnsRows(Fake):
    def compute(self, arrays):
        return {name: array[::-1] for name, array in super().compute(arrays).items()}


class RefusesParameters(Fake):
    kinds = frozenset({"bool_param", "int64_param", "string_param"})

    def ModelInfer(self, request):
        if any(value.WhichOneof("parameter_choice") in self.kinds for value in request.parameters.values()):
            raise InvalidArgument("unexpected parameter")
        return super().ModelInfer(request)


class RefusesWideParameters(RefusesParameters):
    kinds = frozenset({"double_param", "uint64_param"})


class RefusesTensorParameters(Fake):
    def ModelInfer(self, request):
        if any(tensor.parameters for tensor in request.inputs):
            raise InvalidArgument("unexpected parameter")
        return super().ModelInfer(request)


class Drifts(Fake):
    """Another answer to everything from some request on."""

    answered = 0

    def compute(self, arrays):
        self.answered += 1
        outputs = super().compute(arrays)
        return outputs if self.answered < 3 else {**outputs, "scores": outputs["scores"] + 1}


class Random(Fake):
    def compute(self, arrays):
        outputs = super().compute(arrays)
        return {**outputs, "scores": np.random.default_rng().random(outputs["scores"].shape, np.float32)}


class UnknownErrors(Fake):
    """Python's own errors: gRPC makes UNKNOWN of them."""

    def service(self, details):
        handler = super().service(details)
        if handler is None or handler.request_streaming:
            return handler
        rpc = pb.RPCS[details.method.rpartition("/")[2]]

        def answer(data, context):
            try:
                return getattr(self, rpc.name)(self.parse(rpc, data))
            except RequestError as error:
                context.abort(grpc.StatusCode.UNKNOWN, str(error))

        return handler._replace(unary_unary=answer)


class LenientDecoding(Fake):
    """Finds some input where the request has none that is right."""

    def decode(self, request):
        try:
            return super().decode(request)
        except InvalidArgument:
            return {
                "x": np.zeros((1, 3), np.float32),
                "n": np.zeros((1, 2), np.uint8),
                "s": np.array([[b""]], dtype=object),
            }


class LenientOutputs(Fake):
    def requested(self, request):
        try:
            return super().requested(request)
        except InvalidArgument:
            return wire.requested_outputs(pb.ModelInferRequest(), OUTPUTS)


class AnyModel(Fake):
    """One model under every name and version."""

    def ModelInfer(self, request):
        request.model_name, request.model_version = MODEL, ""
        return super().ModelInfer(request)


class AnyEmptyMessage(Fake):
    """The only model, where the request names none."""

    def ModelInfer(self, request):
        if not request.model_name:
            return pb.ModelInferResponse(model_name=MODEL)
        return super().ModelInfer(request)


class LibraryParsing(Fake):
    """As gRPC's libraries parse unless they are told otherwise."""

    def service(self, details):
        handler = super().service(details)
        if handler is None or handler.request_streaming:
            return handler
        rpc = pb.RPCS[details.method.rpartition("/")[2]]
        answer = handler.unary_unary
        return handler._replace(
            request_deserializer=rpc.request.FromString,
            unary_unary=lambda request, context: answer(request.SerializeToString(), context),
        )


class NeverRecovers(Fake):
    """Wrong answers after the first request that is refused for its byte count."""

    broken = False

    def decode(self, request):
        try:
            return super().decode(request)
        except InvalidArgument:
            self.broken = True
            raise

    def compute(self, arrays):
        outputs = super().compute(arrays)
        return {**outputs, "scores": -outputs["scores"]} if self.broken else outputs


# Streams


class DropsAnswers(Fake):
    def ModelStreamInfer(self, requests, context):
        for index, answer in enumerate(super().ModelStreamInfer(requests, context)):
            if index % 3 != 1:
                yield answer


class MixesIds(Fake):
    def ModelStreamInfer(self, requests, context):
        answers = list(super().ModelStreamInfer(requests, context))
        ids = [answer.infer_response.id for answer in answers]
        for answer, identifier in zip(answers, reversed(ids), strict=True):
            answer.infer_response.id = identifier
            yield answer


class EndsOnError(Fake):
    def ModelStreamInfer(self, requests, context):
        for answer in super().ModelStreamInfer(requests, context):
            if answer.error_message:
                context.abort(grpc.StatusCode.NOT_FOUND, answer.error_message)
            yield answer


class WantsARequest(Fake):
    def ModelStreamInfer(self, requests, context):
        requests = list(requests)
        if not requests:
            context.abort(grpc.StatusCode.INTERNAL, "no request")
        yield from super().ModelStreamInfer(requests, context)


class StreamsPlainAnswers(Fake):
    """ModelInferResponse in place of ModelStreamInferResponse, as MLServer does."""

    def ModelStreamInfer(self, requests, context):
        for answer in super().ModelStreamInfer(requests, context):
            yield answer.infer_response


# Extensions


class ChangesConfig(Fake):
    def ModelConfig(self, request):
        answer = super().ModelConfig(request)
        self.change(answer.config)
        return answer


class NamesAnotherConfig(ChangesConfig):
    def change(self, config):
        config.name = "other"


class ConfigOfOtherInputs(ChangesConfig):
    def change(self, config):
        config.input[0].data_type = pb.TYPE_FP64


class ConfigOfOtherOutputs(ChangesConfig):
    def change(self, config):
        config.output[0].name = "logits"


class DimsWithTheBatch(ChangesConfig):
    def change(self, config):
        for tensor in [*config.input, *config.output]:
            tensor.dims[:] = [-1, *tensor.dims]


class SmallerBatchThanSaid(ChangesConfig):
    def change(self, config):
        config.max_batch_size = 65


class LargerBatchThanSaid(ChangesConfig):
    def change(self, config):
        config.max_batch_size = 63


class AnyModelHasAConfig(Fake):
    def ModelConfig(self, request):
        return super().ModelConfig(pb.ModelConfigRequest(name=MODEL))


class OtherStatistics(Fake):
    def ModelStatistics(self, request):
        answer = super().ModelStatistics(request)
        answer.model_stats[0].name = "other"
        return answer


class AnyModelHasStatistics(Fake):
    def ModelStatistics(self, request):
        return pb.ModelStatisticsResponse(model_stats=[self.stats])


class CountsRequests(Fake):
    """In place of rows."""

    def count(self, rows, ns):
        super().count(rows, ns)
        self.stats.inference_count -= rows - 1


class CountsRefusals(Fake):
    def ModelInfer(self, request):
        try:
            return super().ModelInfer(request)
        except InvalidArgument:
            self.count(1, 1000)
            raise


class CountsSeconds(Fake):
    def count(self, rows, ns):
        super().count(rows, ns)
        self.stats.last_inference //= 1000


class QueuesLongerThanAll(Fake):
    def count(self, rows, ns):
        super().count(rows, ns)
        self.stats.inference_stats.queue.ns += 2 * ns


class ListsWithoutServing(Fake):
    missing = frozenset({"ModelStatistics"})


class EmptyIndex(Fake):
    def RepositoryIndex(self, request):
        answer = super().RepositoryIndex(request)
        del answer.models[0]
        return answer


class ItsOwnStates(Fake):
    def RepositoryIndex(self, request):
        answer = super().RepositoryIndex(request)
        for entry in answer.models:
            entry.state = entry.state.title()
        return answer


class IgnoresReady(Fake):
    def RepositoryIndex(self, request):
        return super().RepositoryIndex(pb.RepositoryIndexRequest())


class LoadsAnything(Fake):
    def RepositoryModelLoad(self, request):
        return pb.RepositoryModelLoadResponse()


class UnloadsEverything(Fake):
    unloaded = False

    def RepositoryModelUnload(self, request):
        self.unloaded = True
        raise NotFound("not found, but see what is gone")

    def ModelReady(self, request):
        answer = super().ModelReady(request)
        return pb.ModelReadyResponse() if self.unloaded else answer


class ChangesClasses(ChangesAnswers):
    def change(self, answer, request):
        if request.outputs and "classification" in request.outputs[0].parameters:
            self.reclass(answer.outputs[0], answer.raw_output_contents)

    @staticmethod
    def replace(raw, elements):
        raw[0] = b"".join(len(element).to_bytes(4, "little") + element for element in elements)


class ClassesWithoutScores(ChangesClasses):
    def reclass(self, tensor, raw):
        self.replace(raw, [b"%d:%d" % (index, index) for index in range(tensor.shape[1])][::-1])


class OneClassTooMany(ChangesClasses):
    def reclass(self, tensor, raw):
        tensor.shape[1] += 1
        raw[0] += b"\4\0\0\0" + b"-9:0"


class LowestClassFirst(ChangesClasses):
    def reclass(self, tensor, raw):
        best = wire.decode_outputs(pb.ModelInferResponse(outputs=[tensor], raw_output_contents=[raw[0]]))
        self.replace(raw, best["scores"][0].tolist()[::-1])


class ClassesOfAnyType(Fake):
    def requested(self, request):
        for output in request.outputs:
            if "classification" in output.parameters and output.parameters["classification"].string_param:
                output.parameters["classification"].int64_param = 1
        return super().requested(request)


class NoStatusOfMemory(Fake):
    def SystemSharedMemoryStatus(self, request):
        raise InvalidArgument("no")

    def CudaSharedMemoryStatus(self, request):
        raise InvalidArgument("no")


class NothingToUnregister(Fake):
    def SystemSharedMemoryUnregister(self, request):
        raise InvalidArgument("no")

    def CudaSharedMemoryUnregister(self, request):
        raise InvalidArgument("no")


class IgnoresSharedMemory(Fake):
    def ModelInfer(self, request):
        for tensor in request.inputs:
            if "shared_memory_region" in tensor.parameters:
                tensor.parameters.clear()
                request.raw_input_contents.insert(0, bytes(12))
        return super().ModelInfer(request)


class NoSettings(Fake):
    def TraceSetting(self, request):
        raise InvalidArgument("no")

    def LogSettings(self, request):
        answer = pb.LogSettingsResponse()
        answer.settings["log_file"].SetInParent()
        return answer


# gRPC


class NotServing(Fake):
    health = health_pb2.HealthCheckResponse.NOT_SERVING


class KnowsEveryService(Fake):
    healthy = ("", pb.SERVICE, "conformance.NoSuchService")


class ReflectsNothing(Fake):
    reflected = ()


class OtherNumbers(Fake):
    """KServe's RepositoryModelLoadRequest: the model's name where Triton has the repository's."""

    file = descriptor_pb2.FileDescriptorProto()
    pb.POOL.FindFileByName("protos/open_inference.proto").CopyToProto(file)
    for message in file.message_type:
        if message.name == "RepositoryModelLoadRequest":
            message.field[0].name, message.field[1].name = message.field[1].name, message.field[0].name
            message.field[0].json_name, message.field[1].json_name = "modelName", "repositoryName"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)


class TakesAnyMethod(Fake):
    def service(self, details):
        if details.method.endswith("ConformanceNoSuchMethod"):
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
        return super().service(details)


class DropsLargeMessages(Fake):
    def ModelInfer(self, request):
        if "conformance_padding" in request.parameters:
            raise NotFound("too large to see")
        return super().ModelInfer(request)


STREAMED = ("stream.one", "stream.many", "stream.own-rows", "stream.error")
MALFORMED = (
    "refuse.no-inputs",
    "refuse.missing-input",
    "refuse.unknown-input",
    "refuse.duplicate-input",
    "refuse.*-datatype",
    "refuse.wrong-shape",
    "refuse.wrong-rank",
    "refuse.*-axis",
    "refuse.too-*",
    "refuse.contents-beside-raw",
    "refuse.wrong-field",
    "refuse.out-of-range",
    "refuse.malformed-bytes",
)

# Each server and what it is reported for, no more and no less.
BROKEN: dict[type[Fake], tuple[str, ...]] = {
    Dead: ("server.live",),
    NotReady: ("server.ready",),
    Nameless: ("server.metadata",),
    ModelNeverReady: ("model.ready", "model.ready.version", "repository.*load.unknown-model"),
    EverythingReady: ("model.ready.unknown-*",),
    RenamesTheModel: ("metadata.answer", "metadata.version"),
    HidesVersions: ("metadata.version", "model.ready.version", "infer.version.*"),
    NamesItsOwnDatatype: ("metadata.datatypes", "infer.signature", "config.outputs"),
    ShapesWithMinusTwo: ("metadata.shapes", "infer.signature", "config.shapes"),
    AnyModelHasMetadata: ("metadata.unknown-*",),
    AnswersNothing: ("infer.answer",),
    LosesIds: ("infer.id*", *STREAMED),
    AsciiIds: ("infer.id.any-text",),
    NamesAnotherModel: ("infer.model-name",),
    EchoesTheVersion: ("infer.version.resolved",),
    OneVersionOnly: ("infer.version.named", "refuse.malformed-version"),
    ContentsBesideRaw: ("infer.contents",),
    FlatOutputs: ("infer.signature", "infer.batch", "config.largest-batch"),
    AllOutputsAlways: ("infer.outputs.requested", "infer.outputs.order", "refuse.*-output", "classification.*"),
    FirstOutputByDefault: (
        "infer.outputs.all",
        "infer.outputs.requested",
        "infer.outputs.contents",
        "infer.parameters.tensor",
    ),
    ItsOwnOrder: ("infer.outputs.order",),
    ElementsInTheWrongOrder: ("infer.outputs.contents", "infer.outputs.order", "infer.parameters.tensor"),
    IgnoresTypedContents: ("infer.typed",),
    TurnsRows: ("infer.batch",),
    RefusesParameters: ("infer.parameters", "infer.parameters.priority"),
    RefusesWideParameters: ("infer.parameters.wide", "infer.parameters.priority"),
    RefusesTensorParameters: ("infer.parameters.tensor",),
    UnknownErrors: (
        "refuse.*",
        "metadata.unknown-*",
        "config.unknown-model",
        "statistics.unknown-model",
        "repository.*load.*",
        "config.largest-batch",
        "classification.wrong-type",
        "shared-memory.system.unknown",
    ),
    LenientDecoding: (*MALFORMED, "config.largest-batch"),
    LenientOutputs: ("refuse.*-output", "classification.wrong-type"),
    AnyModel: ("refuse.unknown-model", "refuse.unknown-version", "refuse.malformed-version", "stream.error"),
    AnyEmptyMessage: ("refuse.empty-message",),
    LibraryParsing: ("refuse.not-protobuf", "refuse.truncated", "refuse.not-utf8"),
    DropsAnswers: ("stream.many", "stream.own-rows", "stream.error"),
    MixesIds: ("stream.own-rows",),
    EndsOnError: ("stream.error",),
    WantsARequest: ("stream.none",),
    StreamsPlainAnswers: STREAMED,
    NamesAnotherConfig: ("config.answer",),
    ConfigOfOtherInputs: ("config.inputs",),
    ConfigOfOtherOutputs: ("config.outputs",),
    DimsWithTheBatch: ("config.shapes",),
    SmallerBatchThanSaid: ("config.largest-batch",),
    LargerBatchThanSaid: ("config.largest-batch",),
    AnyModelHasAConfig: ("config.unknown-model",),
    OtherStatistics: ("statistics.*",),
    AnyModelHasStatistics: ("statistics.unknown-model",),
    CountsRequests: ("statistics.counts", "statistics.batches"),
    CountsRefusals: ("statistics.refused",),
    CountsSeconds: ("statistics.last-inference",),
    QueuesLongerThanAll: ("statistics.durations",),
    ListsWithoutServing: ("statistics.*",),
    EmptyIndex: ("repository.index", "repository.states"),
    ItsOwnStates: ("repository.states",),
    IgnoresReady: ("repository.index.ready",),
    LoadsAnything: ("repository.load.*",),
    UnloadsEverything: ("repository.unload.unknown-model",),
    ClassesWithoutScores: ("classification.strings",),
    OneClassTooMany: ("classification.strings", "classification.shape", "classification.order"),
    LowestClassFirst: ("classification.order",),
    ClassesOfAnyType: ("classification.wrong-type",),
    NoStatusOfMemory: ("shared-memory.*",),
    NothingToUnregister: ("shared-memory.*.unregister",),
    IgnoresSharedMemory: ("shared-memory.system.unknown",),
    NoSettings: ("trace.read", "logging.read"),
    NotServing: ("grpc.health", "grpc.health.service", "grpc.health.watch"),
    KnowsEveryService: ("grpc.health.unknown", "grpc.health.watch"),
    ReflectsNothing: ("grpc.reflection",),
    OtherNumbers: ("grpc.reflection.fields",),
    TakesAnyMethod: ("grpc.unknown-method",),
    DropsLargeMessages: ("grpc.large-message",),
}
