"""The commands that ask a running server, and show what it says: predict and models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from serving.client import Client, ModelInfo, PredictResult
from serving.credentials import given_credentials
from serving.errors import InvalidArgument, in_words
from serving.images import Polarity

_COLUMNS = ("model", "version", "state", "file", "runs on", "accuracy", "golden |Δ|")
_BROKEN = ("file", "runs on")  # into lines, where they have to be


def predict(options: argparse.Namespace) -> int:
    """Classify picture files, each by itself, so that one bad file costs no other its answer; gives the exit code."""
    polarity = Polarity[options.polarity.upper().replace("-", "_")]
    table = Table("file", "label", "probability", "next")
    answered: PredictResult | None = None
    failed = 0
    with _client(options) as client:
        for file in options.files:
            try:
                result = client.predict(Path(file), options.model, options.version, options.top_k, polarity)
            except (InvalidArgument, OSError) as error:
                failed += 1
                named = in_words(error) if isinstance(error, OSError) else f"{file}: {error}"
                print(f"error: {named}", file=sys.stderr)  # noqa: T201
                continue
            answered = result
            best = result.predictions[0]
            rest = ", ".join(f"{score.label} {score.probability:.2%}" for score in best.top_k[1:])
            table.add_row(file, best.label, f"{best.probability:.2%}", rest)
    if answered:
        console = _console()
        console.print(table)
        console.print(
            f"{answered.model} version {answered.version}, {answered.backend}, {answered.provider} on {answered.device}"
        )
    return 2 if failed else 0


def models(options: argparse.Namespace) -> int:
    """List what the server has; gives the exit code."""
    with _client(options) as client:
        listed = client.list_models()
    console = _console(highlight=False)
    table = _table([_row(model) for model in listed], console.width)
    # A narrower terminal breaks the lines, and loses nothing.
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=1000), table).minimum)
    console.print(table)
    for model in listed:
        if model.reason:
            console.print(f"{_title(model)}: {model.reason}", soft_wrap=True)
    if options.verbose:
        for model in listed:
            settings = "".join(f"\n  {name} = {value}" for name, value in sorted(model.settings.items()))
            console.print(f"{_title(model)}:{settings or ' not served'}", soft_wrap=True)
    return 0


def _title(model: ModelInfo) -> str:
    return f"{model.name} version {model.version}" if model.version else model.name


def _table(rows: Sequence[tuple[str, ...]], width: int) -> Table:
    """No wider than `width` where the words allow it, and no word is broken."""
    columns = list(zip(_COLUMNS, *rows, strict=True))
    unbroken = [" ".join(cells).split() if cells[0] in _BROKEN else cells for cells in columns]
    least = [max(map(cell_len, parts)) for parts in unbroken]
    room = width - sum(least) - 3 * len(columns) - 1  # the lines between columns, and a space on both sides
    table = Table()
    for cells, whole in zip(columns, least, strict=True):
        more = max(0, min(room, max(map(cell_len, cells)) - whole))
        room -= more
        table.add_column(cells[0], width=whole + more, no_wrap=cells[0] not in _BROKEN)
    for row in rows:
        table.add_row(*row)
    return table


def _row(model: ModelInfo) -> tuple[str, ...]:
    version = f"{model.version} {', '.join(model.version_labels)}".strip()
    if model.state != "READY":
        return (model.name, version, model.state, "", "", "", "")
    return (
        model.name,
        version,
        model.state,
        f"{model.file}, {model.precision}" if model.precision else model.file,
        f"{model.backend}, {model.provider.removesuffix('ExecutionProvider')} on {model.device}",
        f"{model.test_accuracy:.2%}" if model.verified else "",
        f"{model.golden_max_abs:.1e}" if model.verified else "unverified",
    )


def _console(*, highlight: bool = True) -> Console:
    """One that prints text as it is: names of files and reasons may have square brackets, and colons."""
    return Console(markup=False, emoji=False, highlight=highlight)


def _client(options: argparse.Namespace) -> Client:
    return Client(options.server, credentials=given_credentials(options))
