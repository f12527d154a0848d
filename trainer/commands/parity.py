"""`python -m trainer parity`: every file of a version, on every device and through a server, against PyTorch."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serving.credentials import add_credentials, given_credentials
from serving.errors import BundleError
from serving.options import parse
from trainer.commands.parts import add_data_dir, console, known_dataset, obtain, print_whole
from trainer.progress import progress_bar

if TYPE_CHECKING:
    import numpy.typing as npt

    from serving.bundle import Bundle
    from trainer.matrix import Report

_EVERY = "all"
_BISECT_IMAGES = 64  # of the test set: what is wrong with a layer shows in any image, and all layers' values are kept


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parity = commands.add_parser("parity", help="compare every file of a version with the PyTorch model")
    parity.add_argument(
        "--bundle", type=Path, required=True, metavar="PATH", help="a version's folder, or a model's for its newest"
    )
    parity.add_argument(
        "--device",
        default=_EVERY,
        metavar="TEXT",
        help="all, auto, cpu, cuda or cuda:N; all is the CPU and every CUDA device here (default: all)",
    )
    parity.add_argument("--server", metavar="HOST:PORT", help="compare what a server that has the version answers, too")
    add_credentials(parity)
    parity.add_argument(
        "--json", type=Path, metavar="PATH", help="where the report goes (default: runs/parity-<model>-<version>.json)"
    )
    parity.add_argument("--junit", type=Path, metavar="PATH", help="write the report there as JUnit's XML too, for CI")
    parity.add_argument("--picture", type=Path, metavar="PATH", help="draw how far logits are off there, as PNG")
    parity.add_argument(
        "--bisect",
        action="store_true",
        help="compare the ONNX files that fail layer by layer, all of them where none fails",
    )
    add_data_dir(parity)
    parity.set_defaults(command=_parity)


def _parity(options: argparse.Namespace) -> int:
    from serving.bundle import newest, open_bundle
    from serving.config import ServerConfig

    if options.device != _EVERY:
        parse(ServerConfig, argparse.Namespace(device=options.device))  # as the server takes it
    bundle = open_bundle(newest(options.bundle))
    manifest = bundle.manifest
    from trainer import data, matrix, parity

    if options.picture:
        from trainer import parity_plots  # now, so that what is not installed is told before the comparison
    dataset = known_dataset(bundle)
    with contextlib.ExitStack() as stack:
        remote = None
        if options.server:
            from serving.remote import RemoteBackend

            credentials = given_credentials(options)
            remote = stack.enter_context(
                RemoteBackend(options.server, manifest.model, str(manifest.version), credentials)
            )
        test = data.load_test(dataset, obtain(dataset.name, options.data_dir, test_only=True))
        bar = stack.enter_context(progress_bar(console))
        task = bar.add_task("comparing with PyTorch", total=None)

        def show(images: int, total: int) -> None:
            bar.update(task, advance=images, total=total)

        report = parity.check(bundle, test, options.device, on_images=show, remote=remote)
    print_whole(matrix.table(report))
    for text in report.left_out:
        console.print(f"left out: {text}", style="yellow", soft_wrap=True)
    path = options.json or Path("runs") / f"parity-{report.model}-{report.version}.json"
    _make_folder(path)
    path.write_text(json.dumps(report.document(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    console.print(f"report: {path}", soft_wrap=True)
    if options.junit:
        _make_folder(options.junit)
        matrix.write_junit(report, dataset.labels, options.junit)
        console.print(f"JUnit: {options.junit}", soft_wrap=True)
    if options.picture:
        _make_folder(options.picture)
        parity_plots.differences(report).savefig(options.picture, format="png")
        console.print(f"picture: {options.picture}", soft_wrap=True)
    for row, text in matrix.failures(report, dataset.labels):
        title = f"FAILED {row.file}, {row.where}, batch {row.batch_size}"
        console.print(f"{title}: {text}", style="red", soft_wrap=True)
    if options.bisect:
        images = np.concatenate([test.images.numpy(), parity.extremes()])
        worst = {row.worst.index for row in report.rows if row.worst and row.backend == "onnx"}
        some = {*range(min(_BISECT_IMAGES, len(test))), *range(len(test), len(images)), *worst}
        _bisect(bundle, report, images[sorted(some)])
    return 0 if report.passed else 1


def _make_folder(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)


def _bisect(bundle: Bundle, report: Report, images: npt.NDArray[np.uint8]) -> None:
    """The layers of the ONNX files that fail, or of all of them."""
    from trainer import bisect

    every = list(dict.fromkeys(row.file for row in report.rows if row.backend == "onnx"))
    failed = {row.file for row in report.rows if not row.comparison.passed}
    for file in [file for file in every if file in failed] or every:
        try:
            layers = bisect.layers(bundle, file, images)
        except BundleError as error:  # it was a failed row, too
            console.print(f"{file} cannot be compared layer by layer: {error}", style="red", soft_wrap=True)
            continue
        print_whole(bisect.table(file, layers))
        console.print(bisect.summary(file, layers), soft_wrap=True)
    if not every:
        console.print("--bisect: the version has no ONNX file; export one with --formats onnx")
