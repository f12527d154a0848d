"""The model without a server: ONNX Runtime called in a loop, with one thread, and with as many as there are cores."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks.exchanges import random_inputs
from serving.tensors import Array, TensorSpec


@dataclass(frozen=True)
class Figure:
    """What one way of calling the model gives."""

    images: int  # in each call
    threads: int  # of ONNX Runtime, for one call
    loops: int  # that call at the same time
    images_per_s: float
    mean_ms: float  # of a call


def open_model(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def answers(session: Any, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The model's outputs by name."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def measure(session: Any, inputs: Mapping[str, Array], images: int, threads: int, loops: int, seconds: float) -> Figure:
    """Call the model over and over for so many seconds."""
    names = [output.name for output in session.get_outputs()]
    feed = dict(inputs)
    for _ in range(10):
        session.run(names, feed)
    until = time.perf_counter() + seconds
    calls = [0] * loops

    def loop(number: int) -> None:
        while time.perf_counter() < until:
            session.run(names, feed)
            calls[number] += 1

    began = time.perf_counter()
    callers = [threading.Thread(target=loop, args=(number,)) for number in range(loops)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    took = time.perf_counter() - began
    return Figure(images, threads, loops, sum(calls) * images / took, took * loops / max(sum(calls), 1) * 1e3)


def main() -> int:
    """Print the figures as a JSON list."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inprocess", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.ONNX")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8, 64], metavar="N", help="in each call")
    parser.add_argument("--seconds", type=float, default=1.0, metavar="S", help="for each figure (default: 1)")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    figures = []
    for threads, loops in sorted({(1, 1), (cores, 1), (1, cores)}):
        session = open_model(options.model, threads)
        specs = [
            TensorSpec(name=tensor.name, datatype=_datatype(tensor.type), shape=tuple(tensor.shape))
            for tensor in session.get_inputs()
        ]
        for images in options.images:
            inputs = random_inputs(specs, images, seed=0)
            figures.append(measure(session, inputs, images, threads, loops, options.seconds))
    print(json.dumps([asdict(figure) for figure in figures]))
    return 0


def _datatype(onnx_type: str) -> str:
    """The protocol's name for `tensor(uint8)` and the like."""
    name = onnx_type.removeprefix("tensor(").removesuffix(")").upper()
    return {"FLOAT": "FP32", "DOUBLE": "FP64", "FLOAT16": "FP16"}.get(name, name)


if __name__ == "__main__":
    sys.exit(main())
