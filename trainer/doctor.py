"""What this machine can train with: processor, memory, torch and how it was built, GPUs, data sets, and what runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from serving.backends import cuda
from serving.doctor import print_machine, print_versions

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "numpy",
    "torch",
    "torchvision",
    "onnx",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "matplotlib",
    "tensorboard",
)
NO_TORCH = "torch is not installed: pip install 'parityserve[train]'"


def doctor(console: Console, data_dir: Path | None = None) -> bool:
    """Print the report; returns whether the network can be trained here: on the device that `auto` takes, in fp32.

    Args:
        console: where to.
        data_dir: where data sets are kept; the usual place when not given.
    """
    print_versions(console, PACKAGES)
    print_machine(console)
    try:
        import torch
    except ImportError as error:
        console.print(f"[red]{escape(NO_TORCH)}[/red] ({escape(str(error))})")
        return False
    _print_torch(console)
    _print_gpus(console)
    from trainer.devices import select_device

    chosen, why = select_device("auto")
    console.print(f"--device auto takes {chosen}: {escape(why.removeprefix('auto: '))}", soft_wrap=True)
    console.print("\ntraining, one step of a small network:", style="bold")
    problem = None
    for device in dict.fromkeys([torch.device("cpu"), chosen]):
        for dtype in (torch.float32, torch.bfloat16):
            found = step_problem(device, dtype)
            verdict = f"[red]no:[/red] {escape(found)}" if found else "[green]runs[/green]"
            console.print(f"  {device}, {str(dtype).removeprefix('torch.')}: {verdict}", soft_wrap=True)
            if device == chosen and dtype is torch.float32:
                problem = found
    _print_data(console, data_dir)
    return problem is None


def step_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why one step of training fails on a device, in the framework's words; None when it runs.

    A convolution and a linear layer, forward and backward, under autocast unless `dtype` is float32: what is missing in
    an installation shows when these are first used, not before.
    """
    import torch
    from torch import nn

    try:
        network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 26 * 26, 10)).to(device)
        images, labels = torch.rand(16, 1, 28, 28, device=device), torch.arange(16, device=device) % 10
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = nn.functional.cross_entropy(network(images), labels)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        loss.backward()
        optimiser.step()
        value = loss.item()
    except Exception as error:  # whatever the driver or a library raises is the answer
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if 0 < value < 100 else f"the loss of an untrained network is {value}"


def _print_torch(console: Console) -> None:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    cudnn = torch.backends.cudnn.version() if torch.version.cuda else None
    console.print(
        f"torch: {torch.__version__}, {build}{f' and cuDNN {cudnn_text(cudnn)}' if cudnn else ''}; on the CPU it uses "
        f"{torch.backends.cpu.get_cpu_capability()} and {torch.get_num_threads()} threads",
        soft_wrap=True,
    )


def cudnn_text(version: int) -> str:
    """cuDNN's number as it is written: 91002 is 9.10.2, from 9 on; 8902 is 8.9.2."""
    major, rest = divmod(version, 10_000 if version >= 90_000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _print_gpus(console: Console) -> None:
    import torch

    if cuda.device_problem(0) or not torch.cuda.is_available():
        seen = cuda.device_names()
        console.print(
            "GPUs: none that torch can use" + (f", though the driver has {escape(', '.join(seen))}" if seen else "")
        )
        return
    console.print(f"GPUs: the driver is for CUDA up to {cuda.driver_version()}")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        console.print(
            f"  cuda:{index}: {escape(about.name)}, {total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free, "
            f"compute capability {about.major}.{about.minor}",
            soft_wrap=True,
        )


def _print_data(console: Console, data_dir: Path | None) -> None:
    from trainer import data

    folder = data_dir or data.default_data_dir()
    console.print(f"\ndata sets in {escape(str(folder))}:", style="bold", soft_wrap=True)
    for dataset in data.DATASETS.values():
        try:
            train, test = data.load(dataset, folder)
        except data.DataError as error:
            console.print(f"  {dataset.name}: [yellow]no:[/yellow] {escape(str(error))}", soft_wrap=True)
        else:
            console.print(f"  {dataset.name}: {len(train):,} training and {len(test):,} test images", soft_wrap=True)
