"""ONNX files of lower precision, made from the fp32 one: fp16, and int8 with its ranges measured on training images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from trainer.data import Split

CALIBRATION_SEED = 0
_BATCH = 100


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

    The first convolution is quantized too, although it gains nothing itself: ONNX Runtime is slower where it is not.

    Args:
        source: the fp32 file.
        path: the file to write.
        images: uint8 [N, 1, 28, 28]; the ranges of the activations are those that these give.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(source), strict_mode=True)
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
            calibrate_method=CalibrationMethod.MinMax,
            # Logits and probabilities stay as fine as the sums that they come from, not 256 steps.
            nodes_to_exclude=[node.name for node in model.graph.node if node.op_type == "Softmax"],
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
    finally:
        logging.getLogger().setLevel(level)


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
