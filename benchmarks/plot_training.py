"""Draw the test accuracies that `benchmarks.training` measured, one dot a seed, beside what is wanted.

python -m benchmarks.plot_training runs/best-mnist.json runs/best-fashion.json --wanted 99.65 94 docs/accuracy.png
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no window: the picture goes into a file
from matplotlib import pyplot as plt


def draw(reports: list[dict[str, Any]], wanted: list[float], path: Path) -> None:
    """A panel for each report: the accuracies in percent of its seeds, their mean, and a line where one is wanted."""
    figure, panels = plt.subplots(
        1, len(reports), figsize=(3.6 * len(reports), 3.8), layout="constrained", squeeze=False
    )
    for axes, report, line in zip(panels[0], reports, wanted, strict=True):
        runs = [run for run in report["runs"] if run["kind"] == "recipe"]
        percent = [100 * run["test_accuracy"] for run in runs]
        axes.plot([run["seed"] for run in runs], percent, "o", label="one seed")
        axes.axhline(statistics.mean(percent), color="C0", linewidth=1, label=f"mean, {statistics.mean(percent):.2f} %")
        axes.axhline(line, color="C3", linestyle="--", linewidth=1, label=f"wanted, {line:g} %")
        axes.set(title=report["recipe"] or "default", xlabel="seed", ylabel="test accuracy, %")
        axes.set_xticks([run["seed"] for run in runs])
        axes.margins(y=0.35)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draw one picture of several reports."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot_training", description=__doc__.splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+", help="what benchmarks.training --json wrote")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--wanted", type=float, nargs="+", required=True, metavar="PERCENT", help="one for each report")
    options = parser.parse_intermixed_args(arguments)
    if len(options.wanted) != len(options.reports):
        parser.error(f"got {len(options.wanted)} numbers for {len(options.reports)} reports, want one for each")
    try:
        reports = [json.loads(report.read_text(encoding="utf-8")) for report in options.reports]
        draw(reports, options.wanted, options.picture)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}; want files of python -m benchmarks.training --json", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
