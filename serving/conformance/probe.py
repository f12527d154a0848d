"""The server under test: calls to it, and what it says of itself and of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from protos import open_inference as pb
from serving.conformance.rules import Refused, Skipped, Violation, answered
from serving.conformance.samples import RECIPES, make, same
from serving.errors import InvalidArgument
from serving.tensors import DATATYPES, Array
from serving.wire import decode_outputs, encode_input

CONNECT_S = 5.0
CALL_S = 30.0

# Requests and answers may be of any size; whether the server takes them is for the server to say.
CHANNEL_OPTIONS = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]

_NO_MODEL = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)
_NO_SAMPLE = "no valid request is known: see infer.answer"


class Probe:
    """A channel to the server, and what was learned about it before the checks."""

    def __init__(self, channel: grpc.Channel, model: str = "") -> None:
        """Learn about the server and one model.

        Args:
            channel: to the server; must be ready.
            model: which one; the first that is ready when empty.

        Raises:
            ValueError: no such model or it is not ready, or none was named and the server does not say which are.
        """
        self._channel = channel
        self.server = self._server()
        self.extensions = frozenset(self.server.extensions)
        self._no_index = ""  # or why there is none
        self._index = self._models()
        self.model = model or self._first_ready()
        self.metadata = self._metadata()
        self.config = self._config()
        self.problem = self._unknown_signature()  # why no valid request can be made; empty when one can
        self._recipe = RECIPES[0]
        self._sample: dict[str, Array] = {}
        self._answer: dict[str, Array] = {}
        self.version = ""  # that answered
        self.repeatable = True  # whether the same request has the same answer
        if not self.problem:
            self._learn_to_ask()

    # What the server is

    def _server(self) -> pb.ServerMetadataResponse:
        try:
            answer: pb.ServerMetadataResponse = self.call("ServerMetadata", pb.ServerMetadataRequest())
        except (Refused, Violation):
            return pb.ServerMetadataResponse()  # `server.metadata` reports it
        return answer

    def _models(self) -> pb.RepositoryIndexResponse:
        try:
            answer: pb.RepositoryIndexResponse = self.call("RepositoryIndex", pb.RepositoryIndexRequest())
        except (Refused, Violation) as error:
            self._no_index = str(error)
            return pb.RepositoryIndexResponse()  # it need not have one
        return answer

    def _first_ready(self) -> str:
        for entry in self._index.models:
            if entry.state == "READY":
                return entry.name
        if self._no_index:
            raise ValueError(f"--model: needed, for this server gives no index of its models: {self._no_index}")
        states = {f"{entry.name} {entry.version}".strip(): entry.state for entry in self._index.models}
        raise ValueError(f"--model: needed, for this server's index names no model that is READY: {states or 'empty'}")

    def excused(self) -> None:
        """Raise Skipped where the server may call itself not ready: as Triton does when a model could not be loaded."""
        failed = [entry.name for entry in self._index.models if entry.state != "READY" and entry.reason != "unloaded"]
        if failed:
            raise Skipped(f"this server says that it is not ready, and not all of its models are: {failed}")

    def _metadata(self) -> pb.ModelMetadataResponse:
        try:
            answer: pb.ModelMetadataResponse = self.call("ModelMetadata", pb.ModelMetadataRequest(name=self.model))
        except (Refused, Violation) as error:
            if isinstance(error, Refused) and error.code in _NO_MODEL:
                raise ValueError(f"--model {self.model}: {error}") from error
            return pb.ModelMetadataResponse()  # `metadata.answer` reports it
        return answer

    def _config(self) -> pb.ModelConfig | None:
        try:
            answer: pb.ModelConfigResponse = self.call("ModelConfig", pb.ModelConfigRequest(name=self.model))
        except (Refused, Violation):
            return None  # it need not have one
        return answer.config

    @property
    def batches(self) -> bool:
        """Whether the first axis counts rows, as far as the server says: two of them may be sent."""
        first = [tensor.shape[0] if tensor.shape else 0 for tensor in [*self.metadata.inputs, *self.metadata.outputs]]
        return set(first) == {-1} and (self.config is None or self.config.max_batch_size >= 2)

    # Valid requests

    def _unknown_signature(self) -> str:
        if not self.metadata.inputs or not self.metadata.outputs:
            return "ModelMetadata names no inputs or no outputs"
        for tensor in self.metadata.inputs:
            if tensor.datatype not in DATATYPES:
                return f"ModelMetadata gives input '{tensor.name}' the unknown datatype '{tensor.datatype}'"
        return ""

    def _learn_to_ask(self) -> None:
        """Find a recipe whose request the model takes, and keep its answer."""
        problems = []
        for recipe in RECIPES if self._is_open() else RECIPES[:1]:
            self._recipe = recipe
            self._sample = make(self.metadata.inputs, recipe)
            try:
                response = self.infer(self.request())
                self._answer = self.outputs(response)
                self.version = response.model_version
                self.repeatable = same(self._answer, self.outputs(self.infer(self.request())))
            except (Refused, Violation) as error:
                problems.append(str(error))
            else:
                return
        self.problem = f"no request made from ModelMetadata was answered: {problems[0]}"

    def _is_open(self) -> bool:
        """Whether recipes differ for this model."""
        return any(
            min(tensor.shape[1:], default=0) < 0 or DATATYPES[tensor.datatype].kind not in "fb"
            for tensor in self.metadata.inputs
        )

    @property
    def sample(self) -> dict[str, Array]:
        """Inputs that the model takes, with one row where it has rows.

        Raises:
            Skipped: none are known.
        """
        if self.problem:
            raise Skipped(_NO_SAMPLE)
        return self._sample

    @property
    def answer(self) -> dict[str, Array]:
        """The model's outputs for `sample`.

        Raises:
            Skipped: none are known, or they are others every time.
        """
        if self.problem:
            raise Skipped(_NO_SAMPLE)
        if not self.repeatable:
            raise Skipped("this model answers the same request differently each time")
        return self._answer

    def rows(self, count: int) -> dict[str, Array]:
        """Inputs with several rows, made as `sample` was.

        Raises:
            Skipped: the model takes no rows, or no inputs are known.
        """
        if self.problem:
            raise Skipped(_NO_SAMPLE)
        if not self.batches:
            raise Skipped("the model's first axis is not of any length, or its max_batch_size is below 2")
        return make(self.metadata.inputs, self._recipe, count)

    def datatype(self, name: str) -> str:
        """The datatype of an input."""
        return next(tensor.datatype for tensor in self.metadata.inputs if tensor.name == name)

    def request(self, arrays: dict[str, Array] | None = None) -> pb.ModelInferRequest:
        """A valid request with raw contents, for `sample` or for other inputs."""
        request = pb.ModelInferRequest(model_name=self.model)
        for name, array in (self.sample if arrays is None else arrays).items():
            encode_input(request, name, self.datatype(name), array)
        return request

    # Calls

    def infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """As `call` with ModelInfer."""
        response: pb.ModelInferResponse = self.call("ModelInfer", request)
        return response

    def outputs(self, response: pb.ModelInferResponse) -> dict[str, Array]:
        """An answer's outputs; empty contents beside raw ones do not matter here, `infer.contents` reports them.

        Raises:
            Violation: its contents do not fit its own shapes and datatypes.
        """
        readable = pb.ModelInferResponse()
        readable.CopyFrom(response)
        for tensor in readable.outputs:
            if not tensor.contents.ListFields():
                tensor.ClearField("contents")
        try:
            return decode_outputs(readable)
        except InvalidArgument as error:
            raise Violation("outputs whose contents fit their shapes and datatypes", error) from error

    def ask(self, arrays: dict[str, Array] | None = None) -> dict[str, Array]:
        """The outputs for `sample` or for other inputs."""
        return self.outputs(self.infer(self.request(arrays)))

    def call(self, rpc: str, request: Message | bytes) -> Any:
        """The answer to a unary RPC, of its response type.

        Raises:
            Refused: the status is not OK.
            Violation: the answer is no message of that type.
        """
        method = pb.RPCS[rpc]
        send: Callable[..., bytes] = self._channel.unary_unary(method.path, request_serializer=_bytes_of)
        return _decode(answered(lambda: send(request, timeout=CALL_S)), method.response)

    def stream(self, requests: Iterable[pb.ModelInferRequest]) -> list[pb.ModelStreamInferResponse]:
        """Every answer of one ModelStreamInfer stream that all the requests are sent over, then closed.

        Raises:
            Refused: the stream's status is not OK.
            Violation: an answer is no ModelStreamInferResponse.
        """
        method = pb.RPCS["ModelStreamInfer"]
        send: Callable[..., Iterable[bytes]] = self._channel.stream_stream(method.path, request_serializer=_bytes_of)
        answers = answered(lambda: list(send(iter(requests), timeout=CALL_S)))
        return [_decode(answer, method.response) for answer in answers]

    @property
    def channel(self) -> grpc.Channel:
        """For the RPCs of other services."""
        return self._channel


def _bytes_of(request: Message | bytes) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def _decode(data: bytes, response: type[Message]) -> Any:
    try:
        return response.FromString(data)
    except DecodeError as error:
        raise Violation(f"a {response.DESCRIPTOR.name}", f"{len(data)} bytes that are no such message") from error
