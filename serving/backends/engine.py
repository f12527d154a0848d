"""How a file is run, whatever the file: threads, arithmetic, and the options of CUDA and TensorRT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serving.bundle import Precision

MAX_BUCKET = 64  # rows; larger batches are rare, and padding them would cost more than a new size

Provider = Literal["cuda", "tensorrt"]
ConvSearch = Literal["heuristic", "exhaustive", "default"]


@dataclass(frozen=True)
class Engine:
    """What may be chosen of how a file is run; the settings of the server that have these names say more.

    All but `threads` and `tf32` are of ONNX Runtime on a GPU alone.
    """

    threads: int = 1  # of one run on the CPU
    tf32: bool = False
    provider: Provider = "cuda"
    tensorrt_cache: Path | None = None
    cuda_memory_mb: int | None = None
    cuda_conv_search: ConvSearch = "heuristic"
    cuda_graphs: bool = False
    buckets: tuple[int, ...] = ()  # batch sizes that keep buffers on the device, and are what CUDA graphs are made for


DEFAULT = Engine()


def bucket_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The batch sizes that batches are padded to on a GPU, ascending.

    Powers of two up to MAX_BUCKET, and the largest batch where it is below that.
    """
    largest = min(max_batch_size, MAX_BUCKET)
    return tuple(sorted({largest, *(1 << power for power in range(largest.bit_length()))}))


def cuda_options(engine: Engine, device: str) -> dict[str, str]:
    """What ONNX Runtime's CUDA provider is told, for `cuda:N`.

    https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#configuration-options
    """
    options = {
        "device_id": device.partition(":")[2],
        # EXHAUSTIVE, ONNX Runtime's default, tunes again for every new batch size.
        "cudnn_conv_algo_search": engine.cuda_conv_search.upper(),
        "use_tf32": "1" if engine.tf32 else "0",
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles the memory at every growth
    }
    if engine.cuda_memory_mb is not None:
        options["gpu_mem_limit"] = str(engine.cuda_memory_mb << 20)  # bytes
    if engine.cuda_graphs:
        options["enable_cuda_graph"] = "1"
    return options


def tensorrt_options(engine: Engine, device: str, precision: Precision, sha256: str) -> dict[str, str]:
    """What ONNX Runtime's TensorRT provider is told, for `cuda:N`.

    Args:
        engine: its `tensorrt_cache` gets a folder for each file, as TensorRT names what it keeps by the form of the
            network: of two versions that differ in their weights alone, the second would get the first one's.
        device: such as `cuda:0`.
        precision: the file's. TensorRT runs fp16 and int8 only where it is allowed to.
        sha256: of the file.

    https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html#configurations
    """
    options = {
        "device_id": device.partition(":")[2],
        "trt_fp16_enable": "1" if precision == "fp16" else "0",
        "trt_int8_enable": "1" if precision == "int8" else "0",
    }
    if engine.tensorrt_cache is not None:
        options["trt_engine_cache_enable"] = "1"
        options["trt_engine_cache_path"] = str(engine.tensorrt_cache / sha256)
    return options
