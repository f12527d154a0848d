"""ONNX files of lower precision, made from the fp32 one: fp16, and int8 with its ranges measured on training images."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from trainer.data import Split

CALIBRATION_SEED = 0
_BATCH = 100
_FEW_CHANNELS = 3
_EXACT = 2**24  # float32 has every whole number up to here
_WHOLE_SCALE = "whole_scale"


def write_fp16(source: Path, path: Path) -> None:
    """Write an fp32 ONNX file's twin whose weights and activations are fp16; inputs and outputs stay as they are.

    The softmax stays fp32: its sum loses what the probabilities of unlikely classes are made of.
    """
    model = convert_float_to_float16(
        onnx.load(source), keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Softmax"]
    )
    sorted_model = onnx_ir.from_proto(model)
    sorted_model.graph.sort()  # the converter appends its casts
    onnx.save(onnx_ir.to_proto(sorted_model), path)


def write_int8(source: Path, path: Path, images: torch.Tensor) -> None:
    """Write an fp32 ONNX file's twin with int8 weights and uint8 activations, as QuantizeLinear and DequantizeLinear.

    The first convolution stays float where it has few channels to sum over, for which ONNX Runtime's integer one is
    several times as slow as the float one; see `exact_first_convolution`.

    Args:
        source: the fp32 file.
        path: the file to write.
        images: uint8 [N, 1, 28, 28]; the ranges of the activations are those that these give.
    """
    model = onnx.load(source)
    kept = exact_first_convolution(model)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # the root logger, which the quantizer writes its advice to
    try:
        quantize_static(
            model,
            path,
            _Images(model.graph.input[0].name, images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Weights of 7 bits: a CPU without VNNI adds two products in 16 bits, and two of 8 bits may not fit.
            reduce_range=True,
            calibrate_method=CalibrationMethod.MinMax,
            # Logits and probabilities stay as fine as the sums that they come from, not 256 steps.
            nodes_to_exclude=[*kept, *(node.name for node in model.graph.node if node.op_type == "Softmax")],
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
    finally:
        logging.getLogger().setLevel(level)


def exact_first_convolution(model: onnx.ModelProto) -> list[str]:
    """Have the first convolution sum whole numbers, as floats, so that its sums do not depend on their order.

    Else a CPU that adds in another order would round some activation to another of its 256 steps, and the file would
    not answer on every CPU as it did when it was proved. Pixels and weights become whole numbers, and no sum is larger
    than 2^24, up to which floats are exact; one factor, after activation and pooling, brings them back to what they
    were. It also keeps ONNX Runtime from pooling whole numbers, which it is slow at. Where the convolution pads, the
    edge is the mean rounded to a whole pixel.

    Args:
        model: begins with `(image - mean) / std`; changed in place.

    Returns:
        The names of the nodes that must not be quantized; none where the model does not begin with such a convolution.
    """
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    chain = list(_chain(graph, graph.input[0].name))
    if [node.op_type for node in chain[:4]] != ["Cast", "Sub", "Div", "Conv"]:
        return []
    _, sub, div, conv = chain[:4]
    mean, std, weight = (constants[node.input[1]] for node in (sub, div, conv))
    if mean.size > 1 or std.size > 1 or weight.ndim != 4 or weight.shape[1] > _FEW_CHANNELS or not weight.any():
        return []
    bias = constants[conv.input[2]] if len(conv.input) > 2 else np.zeros(len(weight), np.float32)
    dark = np.round(mean)
    weight = weight.astype(np.float64) / std
    bias = bias + (dark - mean) * weight.sum(axis=(1, 2, 3))
    terms = weight[0].size
    largest = (255 * np.abs(weight).sum(axis=(1, 2, 3)) + np.abs(bias)).max()
    factor = np.float32(largest / (_EXACT - 255 * terms))  # rounding adds a half to each number at most

    def constant(name: str, value: npt.ArrayLike) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    sub.input[1] = constant("whole_mean", dark)
    conv.input[:] = [
        sub.output[0],
        constant(f"{conv.input[1]}_whole", np.round(weight / factor)),
        constant("whole_bias", np.round(bias / factor)),
    ]
    graph.node.remove(div)
    kept = [conv, *itertools.takewhile(lambda node: node.op_type in ("Relu", "LeakyRelu", "MaxPool"), chain[4:])]
    last = kept[-1]
    scaled = last.output[0]
    last.output[0] = f"{scaled}_whole"
    scale = onnx.helper.make_node("Mul", [last.output[0], constant(_WHOLE_SCALE, factor)], [scaled], "whole_to_real")
    graph.node.insert(list(graph.node).index(last) + 1, scale)
    used = {name for node in graph.node for name in node.input}
    for unused in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(unused)
    del graph.value_info[:]
    return [node.name for node in (*kept, scale)]


def whole_values(model: onnx.ModelProto) -> dict[str, float]:
    """The values that are whole numbers by `exact_first_convolution` -> what to multiply them by."""
    producers = {output: node for node in model.graph.node for output in node.output}
    found: dict[str, float] = {}
    for tensor in model.graph.initializer:
        if tensor.name == _WHOLE_SCALE:
            node = next(node for node in model.graph.node if _WHOLE_SCALE in node.input)
            while node.op_type != "Conv":
                found[node.input[0]] = float(numpy_helper.to_array(tensor))
                node = producers[node.input[0]]
    return found


def _chain(graph: onnx.GraphProto, tensor: str) -> Iterator[onnx.NodeProto]:
    """The nodes that a tensor goes through, one after the other, until it is used twice or is an output."""
    outputs = {output.name for output in graph.output}
    while tensor not in outputs:
        users = [node for node in graph.node if tensor in node.input]
        if len(users) != 1 or users[0].input[0] != tensor or len(users[0].output) != 1:
            return
        yield users[0]
        tensor = users[0].output[0]


def calibration_images(train: Split, n: int) -> torch.Tensor:
    """Training images to calibrate with, uint8 [about n, 1, 28, 28], as many of each class, drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    shuffled = torch.randperm(len(train), generator=generator)
    labels = train.labels[shuffled]
    classes = labels.unique()
    each = max(1, n // len(classes))
    chosen = torch.cat([shuffled[labels == label][:each] for label in classes])
    return train.images[chosen]


class _Images(CalibrationDataReader):  # type: ignore[misc]  # it ships no types
    """Gives the calibration its images, batch by batch."""

    def __init__(self, name: str, images: torch.Tensor) -> None:
        self._batches: Iterator[dict[str, np.ndarray]] = ({name: batch.numpy()} for batch in images.split(_BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._batches, None)
