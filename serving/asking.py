"""The commands that ask a running server, and show what it says: predict and models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from serving.client import Client, ModelInfo, PredictResult
from serving.credentials import given_credentials
from serving.errors import InvalidArgument
from serving.images import Polarity


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
                print(f"error: {file}: {error}", file=sys.stderr)  # noqa: T201
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
    table = Table()
    for column in ("model", "version", "state", "file", "runs on", "accuracy", "golden |Δ|", "reason"):
        table.add_column(column, overflow="fold")
    for model in listed:
        table.add_row(*_row(model))
    console = _console(highlight=False)
    console.print(table)
    if options.verbose:
        for model in listed:
            settings = "".join(f"\n  {name} = {value}" for name, value in sorted(model.settings.items()))
            console.print(f"{model.name} version {model.version}:{settings or ' not served'}", soft_wrap=True)
    return 0


def _row(model: ModelInfo) -> tuple[str, ...]:
    version = f"{model.version} {', '.join(model.version_labels)}".strip()
    if model.state != "READY":
        return (model.name, version, model.state, "", "", "", "", model.reason)
    return (
        model.name,
        version,
        model.state,
        f"{model.file}, {model.precision}" if model.precision else model.file,
        f"{model.backend}, {model.provider.removesuffix('ExecutionProvider')} on {model.device}",
        f"{model.test_accuracy:.2%}" if model.verified else "",
        f"{model.golden_max_abs:.1e}" if model.verified else "unverified",
        model.reason,
    )


def _console(*, highlight: bool = True) -> Console:
    """One that prints text as it is: names of files and reasons may have square brackets, and colons."""
    return Console(markup=False, emoji=False, highlight=highlight)


def _client(options: argparse.Namespace) -> Client:
    return Client(options.server, credentials=given_credentials(options))
