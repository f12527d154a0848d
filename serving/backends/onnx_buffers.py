"""Run an ONNX Runtime session through buffers that stay on its device, and replay its runs as CUDA graphs.

A plain run allocates its inputs on the device every time. Here each of a few batch sizes has inputs and outputs of its
own there, which are filled and read in place. None of it is CUDA's alone: the buffers of a CPU session are on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort

from serving.tensors import Array, TensorSpec

NO_GRAPH = -1  # of the run option `gpu_graph_id`: do not record this run, and replay none


def can_bind(specs: Iterable[TensorSpec]) -> bool:
    """Whether the number of rows tells every shape: numbers, with one and the same first axis of any length."""
    specs = list(specs)
    rows = {spec.shape[0] if spec.shape else 0 for spec in specs}
    others = [axis for spec in specs for axis in spec.shape[1:]]
    numbers = all(spec.datatype != "BYTES" for spec in specs)
    return numbers and len(rows) == 1 and isinstance(rows.pop(), str) and all(isinstance(axis, int) for axis in others)


class _OfThread(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.buffers: dict[int, _Buffers] = {}


class BufferedSession:
    """A session, and its buffers on `cpu` or `cuda:N`; safe to call from several threads, each of which has its own.

    With graphs, one thread of its own makes every run: ONNX Runtime's CUDA graphs belong to the thread that recorded
    them, and a session that has some may not be run by two.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device: str,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        sizes: Sequence[int],
        graphs: bool = False,
    ) -> None:
        """
        Args:
            session: with CUDA's option `enable_cuda_graph` if `graphs`.
            device: where it runs, read back.
            inputs: what it takes; see `can_bind`.
            outputs: what it answers.
            sizes: the numbers of rows that get buffers, and graphs. Any other is a plain run.
            graphs: whether to record the first run of each of these sizes, and replay it from then on.
        """
        self._session = session
        self._device, _, index = device.partition(":")
        self._index = int(index or 0)
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._sizes = frozenset(sizes)
        self._own = _OfThread()
        self._recorder = ThreadPoolExecutor(1, thread_name_prefix="cuda-graphs") if graphs else None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """As `Backend.run`."""
        if self._recorder:
            return self._recorder.submit(self._run, inputs).result()
        return self._run(inputs)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = {array.shape[0] if array.shape else 0 for array in inputs.values()}
        size = rows.pop() if len(rows) == 1 else 0
        if size not in self._sizes:
            names = [spec.name for spec in self._outputs]
            return dict(zip(names, self._session.run(names, dict(inputs), self._options(NO_GRAPH)), strict=True))
        held = self._own.buffers
        if size not in held:
            held[size] = _Buffers(
                self._session, self._allocate(size, self._inputs), self._allocate(size, self._outputs)
            )
        return held[size].run(inputs, self._options(size))

    def _options(self, graph: int) -> ort.RunOptions | None:
        if not self._recorder:
            return None
        options = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def _allocate(self, size: int, specs: Iterable[TensorSpec]) -> dict[str, Any]:
        return {
            spec.name: ort.OrtValue.ortvalue_from_shape_and_type(
                [size, *spec.dims()[1:]], spec.dtype, self._device, self._index
            )
            for spec in specs
        }


class _Buffers:
    """The inputs and outputs of one batch size, bound to a session; they keep their addresses, as graphs need."""

    def __init__(self, session: ort.InferenceSession, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._session = session
        self._inputs = inputs
        self._outputs = outputs
        self._binding = session.io_binding()
        for name, value in inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, inputs: Mapping[str, Array], options: ort.RunOptions | None) -> dict[str, Array]:
        """As `Backend.run`."""
        for name, value in self._inputs.items():
            value.update_inplace(inputs[name])
        self._session.run_with_iobinding(self._binding, options)
        # Copies: on the CPU, what numpy() gives is the buffer itself, which the next run overwrites.
        return {name: np.array(value.numpy()) for name, value in self._outputs.items()}
