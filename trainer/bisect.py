"""Where an ONNX file departs from the PyTorch model: layer by layer, in the order in which they run.

The file runs in ONNX Runtime with every optimisation off, and with the values between its layers as outputs; the
network with a hook on every module. Which node belongs to which module is told by the exporter's notes in the file,
and where those are lost, as in some int8 files, by the names of the weights.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from rich.markup import escape
from rich.table import Table
from torch import nn

from serving.bundle import Bundle
from serving.errors import BundleError
from serving.parity import Comparison, compare, layer_tolerance
from trainer.artefacts import INPUT, LOGITS
from trainer.models import Network
from trainer.parity import reference
from trainer.precisions import whole_values

NORMALISE = "normalise"  # a step of the network that is no module: what its first layer gets
_SCOPES = "pkg.torch.onnx.name_scopes"  # of a node: modules from the outermost in, then the node itself, as a list
_PREFIX = "network."  # of a module's name in `Deployed`, which is exported
_WEIGHTED = {"Conv", "Gemm", "MatMul"}


@dataclass(frozen=True)
class Layer:
    """One layer, as the file has it beside how PyTorch has it."""

    name: str  # of the module, such as features.3; `normalise`; `logits`
    kind: str  # its class, such as Conv2d
    node: str  # of the file, whose output was compared
    shape: tuple[int, ...]  # of what it gives for one image
    comparison: Comparison


def layers(bundle: Bundle, file: str, images: npt.NDArray[np.uint8]) -> tuple[Layer, ...]:
    """Compare every layer that can be told in an ONNX file with the reference, on the CPU.

    Args:
        bundle: a version.
        file: one of its ONNX files.
        images: uint8 [N, 1, 28, 28].

    Raises:
        BundleError: the file or the weights are damaged, or ONNX Runtime does not run it.
    """
    network = reference(bundle)
    want = _values(network, torch.from_numpy(images))
    try:
        model = onnx.load_from_string(bundle.read(file))
    except DecodeError as error:
        raise BundleError(f"{bundle.path / file}: not an ONNX file ({error}); export the model again") from error
    outputs = _outputs(model, network)
    factors = whole_values(model)
    got = _run(model, outputs, images, f"{bundle.path / file}")
    precision = bundle.manifest.artefacts()[file][1]
    modules = dict(network.named_modules())
    found = []
    for output, (name, node) in outputs.items():
        if name not in want or want[name].size != got[output].size:
            continue  # laid out in another way
        flat = want[name].reshape(len(images), -1)
        comparison = compare(
            flat,
            got[output].reshape(flat.shape).astype(np.float32) * np.float32(factors.get(output, 1)),
            layer_tolerance(precision, "cpu", flat),
        )
        kind = type(modules[name]).__name__ if name in modules else ""
        found.append(Layer(name, kind, node, want[name].shape[1:], comparison))
    return tuple(found)


def first_failing(found: Sequence[Layer]) -> Layer | None:
    """The first layer beyond the tolerance."""
    return next((layer for layer in found if not layer.comparison.passed), None)


def summary(file: str, found: Sequence[Layer]) -> str:
    """What the layers say of a file, as a sentence."""
    layer = first_failing(found)
    if layer is None:
        return f"{file}: every layer is within the tolerance, for the images that were compared"
    before = found[found.index(layer) - 1].name if found.index(layer) else "the image"
    return (
        f"{file} departs from PyTorch first at {layer.name}{layer.kind and f', a {layer.kind}'} (node {layer.node}): "
        f"up to {before} it agrees; look at that layer's weights and constants in the file, or export the model again"
    )


def table(file: str, found: Sequence[Layer]) -> Table:
    """The layers as a terminal shows them."""
    shown = Table(title=f"{file}, layer by layer")
    for column in ("layer", "kind", "node", "shape", "max |Δ|", "verdict"):
        shown.add_column(column, no_wrap=True, justify="right" if column in ("max |Δ|", "verdict") else "left")
    for layer in found:
        shown.add_row(
            layer.name,
            layer.kind,
            escape(layer.node),
            " × ".join(map(str, layer.shape)),
            f"{layer.comparison.max_abs:.1e}",
            "[green]pass[/green]" if layer.comparison.passed else "[red]FAIL[/red]",
        )
    return shown


def _values(network: Network, images: torch.Tensor) -> dict[str, npt.NDArray[np.float32]]:
    """What each module without parts gives in PyTorch, and the steps that are no modules, by name."""
    values: dict[str, npt.NDArray[np.float32]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            values[name] = output.numpy().copy()

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in network.named_modules()
        if not any(module.children())
    ]
    try:
        with torch.inference_mode():
            values[NORMALISE] = network.normalise(images).numpy()
            values[LOGITS.name] = network(images).numpy()
    finally:
        for handle in handles:
            handle.remove()
    return values


def _outputs(model: onnx.ModelProto, network: Network) -> dict[str, tuple[str, str]]:
    """The values of the graph that are a layer's output -> the layer's name and the node's, in the graph's order."""
    modules = dict(network.named_modules())
    last: dict[str, tuple[str, str]] = {}  # layer -> value and node: the last node of a layer gives its output
    for node in model.graph.node:
        name = _layer(node, modules)
        if name:
            last[name] = (node.output[0], node.name)
        if LOGITS.name in node.output:
            last[LOGITS.name] = (LOGITS.name, node.name)
    values = {value for value, _ in last.values()}
    order = [value for node in model.graph.node for value in node.output if value in values]
    layers = {value: (name, node) for name, (value, node) in last.items()}
    return {value: layers[value] for value in order}


def _layer(node: onnx.NodeProto, modules: dict[str, nn.Module]) -> str | None:
    """The layer that a node belongs to; None where it cannot be told."""
    if "network.std" in node.input:
        return NORMALISE
    for note in node.metadata_props:
        if note.key == _SCOPES:
            name: str = ast.literal_eval(note.value)[-2].removeprefix(_PREFIX)
            if name in modules and not any(modules[name].children()):
                return name
    if node.op_type in _WEIGHTED and len(node.input) > 1:
        weight = re.match(rf"{re.escape(_PREFIX)}(.+)\.weight", node.input[1])
        if weight and weight[1] in modules:
            return _folded(weight[1], modules)
    return None


def _folded(name: str, modules: dict[str, nn.Module]) -> str:
    """The layer whose output a node has whose weights are of `name`: the exporter folds a batch norm into it."""
    part, _, index = name.rpartition(".")
    following = f"{part}.{int(index) + 1}"
    return following if isinstance(modules.get(following), nn.BatchNorm1d | nn.BatchNorm2d) else name


def _run(
    model: onnx.ModelProto, outputs: Sequence[str] | dict[str, Any], images: npt.NDArray[np.uint8], what: str
) -> dict[str, npt.NDArray[np.generic]]:
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs if name not in have)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # or layers melt together
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # fatal only: what goes wrong is raised
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(outputs, session.run(list(outputs), {INPUT.name: images}), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions share no root but this
        raise BundleError(f"{what}: ONNX Runtime does not run it: {error}") from error
