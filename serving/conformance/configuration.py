"""Checks of ModelConfig, and that it agrees with ModelMetadata as load generators need it to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protos import open_inference as pb
from serving.conformance.metadata import NOT_FOUND, UNKNOWN_MODEL
from serving.conformance.probe import Probe
from serving.conformance.refusals import INVALID_ARGUMENT, still_answers
from serving.conformance.rules import Check, Group, Skipped, expect, refused
from serving.tensors import shape_text

_LARGEST_TRIED_BYTES = 2 << 20  # of a batch that is too large: below the 4 MiB that any server takes


def _config(probe: Probe) -> pb.ModelConfig:
    config: pb.ModelConfig = probe.call("ModelConfig", pb.ModelConfigRequest(name=probe.model)).config
    return config


def answer(probe: Probe) -> None:
    config = _config(probe)
    expect(config.name == probe.model, f"config.name '{probe.model}'", f"'{config.name}'")
    expect(config.max_batch_size >= 0, "max_batch_size >= 0", config.max_batch_size)


def unknown_model(probe: Probe) -> None:
    _config(probe)
    refused(lambda: probe.call("ModelConfig", pb.ModelConfigRequest(name=UNKNOWN_MODEL)), NOT_FOUND)


def inputs(probe: Probe) -> None:
    _same_tensors(_config(probe).input, probe.metadata.inputs, "input")


def outputs(probe: Probe) -> None:
    _same_tensors(_config(probe).output, probe.metadata.outputs, "output")


def _same_tensors(
    configured: Sequence[pb.ModelInput | pb.ModelOutput],
    listed: Sequence[pb.ModelMetadataResponse.TensorMetadata],
    role: str,
) -> None:
    """The same names and datatypes; TYPE_STRING is the configuration's word for BYTES."""
    wanted = {tensor.name: "STRING" if tensor.datatype == "BYTES" else tensor.datatype for tensor in listed}
    got = {tensor.name: pb.DataType.Name(tensor.data_type).removeprefix("TYPE_") for tensor in configured}
    expect(got == wanted, f"config.{role} with ModelMetadata's names and datatypes, {wanted}", got)


def shapes(probe: Probe) -> None:
    """Metadata has the batch axis, as -1 in front, exactly where max_batch_size is above 0; dims never have it."""
    config = _config(probe)
    listed = {tensor.name: list(tensor.shape) for tensor in [*probe.metadata.inputs, *probe.metadata.outputs]}
    tensors: list[pb.ModelInput | pb.ModelOutput] = [*config.input, *config.output]
    for tensor in tensors:
        if tensor.name not in listed:
            continue  # `config.inputs` and `config.outputs` report it
        wanted = [-1, *tensor.dims] if config.max_batch_size else list(tensor.dims)
        said = f"{shape_text(tuple(wanted))} in ModelMetadata for '{tensor.name}', from dims and max_batch_size"
        expect(listed[tensor.name] == wanted, said, shape_text(tuple(listed[tensor.name])))


def largest_batch(probe: Probe) -> None:
    """As many rows as max_batch_size says are answered, one more is refused."""
    config = _config(probe)
    row_bytes = sum(len(raw) for raw in probe.request().raw_input_contents)
    if not config.max_batch_size:
        raise Skipped("max_batch_size is 0")
    if row_bytes * config.max_batch_size > _LARGEST_TRIED_BYTES:
        raise Skipped(f"max_batch_size is {config.max_batch_size}: too many bytes to try")
    full = {name: np.repeat(array, config.max_batch_size, axis=0) for name, array in probe.sample.items()}
    for name, array in probe.ask(full).items():
        expect(len(array) == config.max_batch_size, f"{config.max_batch_size} rows of '{name}'", len(array))
    over = {name: np.repeat(array, config.max_batch_size + 1, axis=0) for name, array in probe.sample.items()}
    refused(lambda: probe.ask(over), INVALID_ARGUMENT)
    still_answers(probe)


_RULE = "Triton, Model Configuration extension"

CHECKS = [
    Check("config.answer", Group.EXTENSION, _RULE, answer, "model_configuration"),
    Check(
        "config.unknown-model",
        Group.EXTENSION,
        f"{_RULE}; google.rpc.Code: NOT_FOUND",
        unknown_model,
        "model_configuration",
    ),
    Check("config.inputs", Group.EXTENSION, f"{_RULE}: input", inputs, "model_configuration"),
    Check("config.outputs", Group.EXTENSION, f"{_RULE}: output", outputs, "model_configuration"),
    Check("config.shapes", Group.EXTENSION, f"{_RULE}: dims, max_batch_size", shapes, "model_configuration"),
    Check("config.largest-batch", Group.EXTENSION, f"{_RULE}: max_batch_size", largest_batch, "model_configuration"),
]
