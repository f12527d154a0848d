"""How large each artefact of a version is, and how much time of one thread of the CPU it takes.

    python -m benchmarks.variants --bundle exported/mnist --write docs/export.md

Rounds alternate between the artefacts, and each figure is the median of its rounds: drift of the machine cancels.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.exchanges import random_inputs
from benchmarks.machine import describe
from benchmarks.report import Grid, write_between_markers
from serving.backends import Backend, open_backend
from serving.bundle import ONNX, Bundle, newest, open_bundle
from serving.errors import ParityserveError
from trainer.progress import progress_bar

CALLS = 10  # between two looks at the clock


def main(arguments: list[str] | None = None) -> int:
    """Measure every artefact and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, nargs="+", required=True, metavar="PATH", help="versions, or models")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 64], metavar="N", help="in a call")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="(default: 9)")
    parser.add_argument("--seconds", type=float, default=0.3, metavar="S", help="for each figure of a round")
    parser.add_argument("--write", type=Path, metavar="PATH", help="put the tables between the markers of this file")
    options = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        bundles = [open_bundle(newest(path)) for path in options.bundle]
        grids = [_measure(bundle, options.images, options.rounds, options.seconds, console) for bundle in bundles]
    except ParityserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for grid in grids:
        console.print(grid.rich())
    if options.write:
        about = ", ".join(f"{name} {value}" for name, value in describe().items())
        rounds = f"Medians of {options.rounds} rounds of {options.seconds} s, one thread."
        text = "\n".join([f"Measured on: {about}. {rounds}\n", *(grid.markdown() for grid in grids)])
        write_between_markers(options.write, text)
    return 0


def _measure(bundle: Bundle, sizes: Sequence[int], rounds: int, seconds: float, console: Console) -> Grid:
    """The table of one version."""
    manifest = bundle.manifest
    backends = {
        file: open_backend(name, bundle, "cpu", precision=precision)
        for file, (name, precision) in manifest.artefacts().items()
    }
    found: dict[tuple[str, int], list[float]] = {}
    with progress_bar(console) as bar:
        task = bar.add_task(f"{manifest.model}: {rounds} rounds", total=rounds)
        for _ in range(rounds):
            for file, backend in backends.items():
                for size in sizes:
                    found.setdefault((file, size), []).append(_us_an_image(backend, size, seconds))
            bar.advance(task)
    medians = {key: statistics.median(values) for key, values in found.items()}
    rows = []
    for file in backends:
        entry = manifest.files[file]
        row = [f"`{file}`", f"{entry.size_bytes:,}"]
        for size in sizes:
            ratio = f"{medians[ONNX, size] / medians[file, size]:.2f}" if ONNX in backends else ""
            row += [f"{medians[file, size]:.1f}", ratio]
        if entry.parity:
            row += [f"{entry.parity.max_abs:.1e}", f"{entry.parity.top1_agreement:.2%}"]
        rows.append(tuple(row))
    columns = [text for n in sizes for text in (f"µs an image, {n} a call", "times fp32")]
    title = f"{manifest.model}, {manifest.network}, {manifest.parameters:,} parameters"
    return Grid(title, ("file", "bytes", *columns, "largest Δ of logits", "same class"), rows)


def _us_an_image(backend: Backend, images: int, seconds: float) -> float:
    inputs = random_inputs(backend.inputs, images, seed=0)
    for _ in range(CALLS):
        backend.run(inputs)
    calls, began = 0, time.process_time()  # of the CPU: what else runs here counts less
    while (took := time.process_time() - began) < seconds:
        for _ in range(CALLS):
            backend.run(inputs)
        calls += CALLS
    return took / (calls * images) * 1e6


if __name__ == "__main__":
    sys.exit(main())
