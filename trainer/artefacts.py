"""The files of a version that can be served, one function a format, and which of them go together."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx
import torch

from serving.backends import aoti, pt2
from serving.backends.torchscript import save_traced
from serving.bundle import ARTEFACTS, Precision
from serving.tensors import TensorSpec
from trainer import precisions
from trainer.config import CLASSES, HEIGHT, WIDTH
from trainer.models import Deployed

OPSET = 20  # ONNX Runtime 1.27 and later run it, and no conversion step is needed from what torch writes

INPUT = TensorSpec(name="image", datatype="UINT8", shape=("batch", 1, HEIGHT, WIDTH))
LOGITS = TensorSpec(name="logits", datatype="FP32", shape=("batch", CLASSES))
PROBABILITIES = TensorSpec(name="probabilities", datatype="FP32", shape=("batch", CLASSES))

FORMATS = tuple(dict.fromkeys(backend for backend, _ in ARTEFACTS))
PRECISIONS = tuple(dict.fromkeys(precision for _, precision in ARTEFACTS))

Artefact = tuple[str, Precision]  # backend and precision, a key of ARTEFACTS
DEFAULT: tuple[Artefact, ...] = (("onnx", "fp32"), ("torchscript", "fp32"))


def choose(formats: Sequence[str], precisions: Sequence[str]) -> tuple[Artefact, ...]:
    """Every format in every precision that it has.

    Raises:
        ValueError: a name is unknown, or one of them would give no file; the text has the choices.
    """
    options = [("--formats", formats, FORMATS), ("--precisions", precisions, PRECISIONS)]
    for option, given, known in options:
        for name in given or ["nothing"]:
            if name not in known:
                raise ValueError(f"{option}: got {name}, want some of {', '.join(known)}")
    chosen = tuple(pair for pair in ARTEFACTS if pair[0] in formats and pair[1] in precisions)
    for index, (option, given, _) in enumerate(options):
        for name in given:
            if name not in [pair[index] for pair in chosen]:
                have = ", ".join(" ".join(pair) for pair in ARTEFACTS)
                raise ValueError(f"{option} {name}: no file to write goes with the rest; there are {have}")
    return chosen


def write(
    deployed: Deployed,
    chosen: Sequence[Artefact],
    folder: Path,
    about: dict[str, str],
    calibration: torch.Tensor | None = None,
    on_step: Callable[[str], None] = lambda _: None,
) -> None:
    """Write the chosen artefacts into a folder, under their names in `ARTEFACTS`.

    Args:
        deployed: the network to export, in eval mode, on the CPU.
        chosen: what to write.
        folder: where to.
        about: what an ONNX file says about itself, for a reader who has only that file.
        calibration: training images for int8, uint8 [N, 1, 28, 28].
        on_step: called with what is about to be done.

    Raises:
        ValueError: int8 is wanted, and there are no images to calibrate with.
        RuntimeError: there is no C++ compiler for AOTInductor.
    """
    example = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.uint8)  # two: of one, the axis would be taken for fixed
    paths = {pair: folder / name for pair, name in ARTEFACTS.items()}
    source = paths["onnx", "fp32"]  # of the other ONNX files too
    program = functools.cache(lambda: pt2.exported_program(deployed, example))
    if "onnx" in [backend for backend, _ in chosen]:
        on_step("writing ONNX")
        _write_onnx(deployed, example, source, about)
    for pair in chosen:
        if pair != ("onnx", "fp32"):
            on_step(f"writing {' '.join(pair)}")
        match pair:
            case ("onnx", "fp16"):
                precisions.write_fp16(source, paths[pair])
            case ("onnx", "int8"):
                if calibration is None:
                    raise ValueError("int8 needs training images to calibrate with")
                precisions.write_int8(source, paths[pair], calibration)
            case ("torchscript", _):
                save_traced(deployed, example, paths[pair])
            case ("pt2", _):
                pt2.save(program(), paths[pair])
            case ("aoti", _):
                aoti.save(program(), paths[pair])
    if ("onnx", "fp32") not in chosen:
        source.unlink(missing_ok=True)


def _write_onnx(deployed: Deployed, example: torch.Tensor, path: Path, about: dict[str, str]) -> None:
    with _quiet_exporter():
        program = torch.onnx.export(
            deployed,
            (example,),
            input_names=[INPUT.name],
            output_names=[LOGITS.name, PROBABILITIES.name],
            dynamic_shapes=({0: "batch"},),
            opset_version=OPSET,
            dynamo=True,
        )
    assert program is not None, "torch.onnx.export returns a program when it is not given a file"
    program.model.metadata_props.update(about)
    for node in program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # names folders of the machine that exports
    model = program.model_proto
    _activate_before_pooling(model)
    onnx.save(model, path)  # one file: f=... would put the weights into a second one


def _activate_before_pooling(model: onnx.ModelProto) -> None:
    """Put each ReLU that follows a max-pooling before it, which gives the same numbers.

    ONNX Runtime then makes one step of the convolution and the ReLU. And quantized to int8, max-pooling must have one
    range for what goes in and comes out, as behind a ReLU: otherwise ONNX Runtime pools floats, slower than in fp32.
    """
    nodes = list(model.graph.node)
    for pool in tuple(nodes):
        following = [node for node in nodes if pool.output[0] in node.input]
        if pool.op_type != "MaxPool" or [node.op_type for node in following] != ["Relu"]:
            continue
        (relu,) = following
        before, between, after = pool.input[0], pool.output[0], relu.output[0]
        relu.input[0], relu.output[0], pool.input[0], pool.output[0] = before, between, between, after
        del pool.metadata_props[:]
        pool.metadata_props.extend(relu.metadata_props)  # whose layer's output it now gives
        nodes.remove(relu)
        nodes.insert(nodes.index(pool), relu)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # with shapes of the other order


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter prints its progress, and warns of torch's own deprecations; its errors are raised all the same."""
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.getLogger("torch.onnx").setLevel(level)
