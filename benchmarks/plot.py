"""Draw the figures of `benchmarks.serving`.

python -m benchmarks.plot runs/serving.json docs/performance.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no window: the picture goes into a file
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Report = dict[str, Any]


def draw(report: Report, path: Path) -> None:
    """Throughput and latency by requests in flight, and images a second by images in a request."""
    figure, (rate, latency, images) = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    smallest = min(row["images"] for row in report["rows"])
    for number, server in enumerate(report["servers"]):
        for stream in (False, True):
            rows = [row for row in report["rows"] if (row["server"], row["stream"]) == (server, stream)]
            if not rows:
                continue
            style: dict[str, Any] = {"color": f"C{number}", "marker": "o", "linestyle": "--" if stream else "-"}
            style["label"] = f"{server}, streamed" if stream else server
            small = [row for row in rows if row["images"] == smallest]
            rate.plot(*_columns(small, "in_flight", "requests_per_s"), **style)
            latency.plot(*_columns(small, "in_flight", "mean_ms"), **style)
            if report["servers"][server]["computes"]:
                best = {row["images"]: row for row in sorted(rows, key=lambda row: float(row["images_per_s"]))}
                images.plot(*_columns(list(best.values()), "images", "images_per_s"), **style)
    loops = {one["images"]: one for one in sorted(report["inprocess"], key=lambda one: float(one["images_per_s"]))}
    images.plot(*_columns(list(loops.values()), "images", "images_per_s"), label="ONNX Runtime in a loop", color="gray")
    small_title = f"{smallest} image{'s' * (smallest != 1)} a request"
    in_flight = sorted({row["in_flight"] for row in report["rows"]})
    _label(rate, small_title, "requests in flight", "requests/s", in_flight)
    _label(latency, small_title, "requests in flight", "mean latency, ms", in_flight)
    latency.set_yscale("log")
    sizes = sorted({row["images"] for row in report["rows"]})
    _label(images, "at the best number of requests in flight", "images a request", "images/s", sizes)
    for axes in (rate, images):
        axes.set_ylim(0, None)
    lines = {line.get_label(): line for axes in (rate, images) for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _columns(rows: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    ordered = sorted(rows, key=lambda row: float(row[x]))
    return [row[x] for row in ordered], [row[y] for row in ordered]


def _label(axes: Axes, title: str, x: str, y: str, ticks: list[int]) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.grid(alpha=0.3)


def main(arguments: list[str] | None = None) -> int:
    """Draw one file of figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, metavar="FIGURES.JSON")
    parser.add_argument("picture", type=Path, metavar="PICTURE.PNG")
    options = parser.parse_args(arguments)
    try:
        draw(json.loads(options.figures.read_text(encoding="utf-8")), options.picture)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
