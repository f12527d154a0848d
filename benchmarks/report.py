"""The figures of `benchmarks.serving` as tables: for a terminal, and as Markdown for docs/performance.md.

python -m benchmarks.report runs/serving.json --write docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.contenders import BOUND, OURS

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
ONE_BY_ONE = "one by one"  # our server without batching, as `--also` calls it

Report = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """One table: the titles of its columns, and its rows."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """As Markdown; the first column is text, the others are numbers."""
        ruler = "|".join(["---", *["---:"] * (len(self.columns) - 1)])
        lines = [f"| {' | '.join(self.columns)} |", f"|{ruler}|", *(f"| {' | '.join(row)} |" for row in self.rows)]
        return f"### {self.title}\n\n" + "\n".join(lines) + "\n"

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title)
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(report: Report) -> list[Table]:
    """Every table, for a terminal."""
    return [grid.rich() for grid in _grids(report)]


def markdown(report: Report) -> str:
    """Every table and what they were measured on, as Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    peers = [f"{name}: {one['package']}" for name, one in report["servers"].items() if "package" in one]
    options = report["options"]
    how = (
        f"Measured on: {machine}" + (f"; peers: {', '.join(peers)}" if peers else "") + ". "
        f"Medians of {options['rounds']} rounds of {options['seconds']} s, over {options['connections']} connections."
    )
    parts = [how + "\n", "![requests, latency and images a second](performance.png)\n"]
    return "\n".join([*parts, *(grid.markdown() for grid in _grids(report))])


def _grids(report: Report) -> list[Grid]:
    return [grid for grid in (_targets(report), *_requests(report), _loops(report), _servers(report)) if grid.rows]


def find(report: Report, server: str, images: int, in_flight: int, stream: bool = False) -> Row | None:
    """The figures of one case; None where it was not measured."""
    wanted = (server, images, in_flight, stream)
    for row in report["rows"]:
        if (row["server"], row["images"], row["in_flight"], row["stream"]) == wanted:
            found: Row = row
            return found
    return None


def _targets(report: Report) -> Grid:
    """What was to be reached, for the cases that were measured."""
    rows = [
        (what, wanted, measured, "yes" if reached else "**no**") for what, wanted, measured, reached in _judged(report)
    ]
    return Grid("Targets", ("target", "wanted", "measured", "reached"), rows)


def _judged(report: Report) -> Iterator[tuple[str, str, str, bool]]:
    ours = find(report, OURS, 1, 32)
    for other, least in ((BOUND, 1.05), ("pytriton", 2.4), ("mlserver", 3.5)):
        theirs = find(report, other, 1, 32)
        if ours and theirs and theirs["requests_per_s"]:
            ratio = ours["requests_per_s"] / theirs["requests_per_s"]
            yield f"requests/s of {other}, 1 image, 32 in flight", f"≥ {least:g} ×", f"{ratio:.2f} ×", ratio >= least
    if ours and ours["mean_batch"]:
        yield "mean batch, 1 image, 32 in flight", "> 1", f"{ours['mean_batch']:.1f}", ours["mean_batch"] > 1
    alone, bound = find(report, OURS, 1, 1), find(report, BOUND, 1, 1)
    model = next(
        (one for one in report["inprocess"] if (one["images"], one["threads"], one["loops"]) == (1, 1, 1)), None
    )
    if alone and bound and model:
        most = bound["mean_ms"] + model["mean_ms"] + 0.060
        what = "mean latency, 1 image, 1 in flight: the bound's + the model's + 0.06 ms"
        yield what, f"≤ {most:.3f} ms", f"{alone['mean_ms']:.3f} ms", alone["mean_ms"] <= most
    unbatched = find(report, ONE_BY_ONE, 1, 1)
    if alone and unbatched:
        ratio = alone["mean_ms"] / unbatched["mean_ms"]
        yield "mean latency, 1 in flight, beside no batching", "≤ 1.05 ×", f"{ratio:.2f} ×", ratio <= 1.05
    many = [row["images_per_s"] for row in report["rows"] if row["server"] == OURS and row["images"] == 64]
    loops = [one["images_per_s"] for one in report["inprocess"] if one["images"] == 64]
    if many and loops:
        ratio = max(many) / max(loops)
        yield "images/s of ONNX Runtime in the best loop, 64 images", "≥ 0.95 ×", f"{ratio:.2f} ×", ratio >= 0.95
    if server := report["servers"].get(OURS):
        yield "start to first answer", "≤ 1.0 s", f"{server['ready_s']:.2f} s", server["ready_s"] <= 1.0
        largest = max(server["rss_mb"] + server.get("rss_mb_after", []))
        yield "resident memory of one process, after the load", "≤ 250 MB", f"{largest:.0f} MB", largest <= 250
        idle = server["idle_cpu_percent"]
        yield "CPU while idle", "< 1 %", f"{idle:.2f} %", idle < 1


_REQUEST_COLUMNS: dict[str, Callable[[Row], str]] = {
    "server": lambda row: str(row["server"]),
    "images": lambda row: str(row["images"]),
    "in flight": lambda row: str(row["in_flight"]),
    "requests/s": lambda row: f"{row['requests_per_s']:,.0f}",
    "images/s": lambda row: f"{row['images_per_s']:,.0f}",
    "of bound": lambda row: _or_none(row["ratio_to_bound"], ".2f"),
    "mean ms": lambda row: _or_none(row["mean_ms"], ".2f"),
    "p50": lambda row: _or_none(row["p50_ms"], ".2f"),
    "p99": lambda row: _or_none(row["p99_ms"], ".2f"),
    "batch": lambda row: _or_none(row["mean_batch"], ".1f"),
    "CPU µs": lambda row: f"{row['cpu_us_per_request']:.0f}",
    "generator µs": lambda row: f"{row['generator_cpu_us_per_request']:.0f}",
}


def _requests(report: Report) -> list[Grid]:
    """Every case, unary and streamed; CPU is what a request costs the server's processes, and the load generator."""
    grids = []
    for title, stream in (("Unary", False), ("Streamed", True)):
        rows = [row for row in report["rows"] if row["stream"] == stream]
        cells = [tuple(cell(row) for cell in _REQUEST_COLUMNS.values()) for row in rows]
        grids.append(Grid(title, tuple(_REQUEST_COLUMNS), cells))
    return grids


def _or_none(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _loops(report: Report) -> Grid:
    rows = [
        (
            f"{one['images']:g}",
            f"{one['threads']:g}",
            f"{one['loops']:g}",
            f"{one['images_per_s']:,.0f}",
            f"{one['mean_ms']:.3f}",
        )
        for one in sorted(report["inprocess"], key=lambda one: (one["images"], one["threads"], one["loops"]))
    ]
    columns = ("images a call", "threads a call", "calls at a time", "images/s", "ms a call")
    return Grid("ONNX Runtime in a loop, without a server", columns, rows)


def _servers(report: Report) -> Grid:
    rows = [
        (
            name,
            f"{one['ready_s']:.2f} s",
            f"{one['idle_cpu_percent']:.2f} %",
            *(" + ".join(f"{size:.0f}" for size in one.get(key, [])) for key in ("rss_mb", "rss_mb_after")),
        )
        for name, one in report["servers"].items()
    ]
    columns = ("server", "first answer after", "idle CPU", "resident MB of each process", "after the load")
    return Grid("At rest", columns, rows)


def main(arguments: list[str] | None = None) -> int:
    """Print the Markdown, or put it between the markers of a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("figures", type=Path, metavar="FIGURES.JSON")
    parser.add_argument("--write", type=Path, metavar="PATH", help=f"between {BEGIN} and {END} in this file")
    options = parser.parse_args(arguments)
    try:
        text = markdown(json.loads(options.figures.read_text(encoding="utf-8")))
        if options.write is None:
            print(text)
        else:
            write_between_markers(options.write, text)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write_between_markers(path: Path, text: str) -> None:
    """Put text between BEGIN and END in a file.

    Raises:
        ValueError: the file has no such place.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path}: no {BEGIN} followed by {END}")
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
