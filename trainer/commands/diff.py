"""`python -m trainer diff A B`: what changes from one version to another, before the other takes over."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from trainer.commands.parts import add_data_dir, console, known_dataset, obtain

if TYPE_CHECKING:
    from trainer.diff import Difference, Flip

_LISTED = 20  # flipped images of a kind that are printed; all of them stand in the JSON


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    diff = commands.add_parser("diff", help="compare two versions: accuracy, classes, images that flipped")
    for name, what in (("a", "the one that is served, say"), ("b", "the one that shall follow it")):
        diff.add_argument(
            name, type=Path, metavar=name.upper(), help=f"a version's folder, or a model's for its newest: {what}"
        )
    diff.add_argument("--json", type=Path, metavar="PATH", help="write the report there, with every flipped image")
    diff.add_argument("--picture", type=Path, metavar="PATH", help="draw the flipped images there, as PNG")
    add_data_dir(diff)
    diff.set_defaults(command=_diff)


def _diff(options: argparse.Namespace) -> int:
    from serving.bundle import newest, open_bundle

    a, b = (open_bundle(newest(path)) for path in (options.a, options.b))
    dataset = known_dataset(a)
    from trainer import data
    from trainer.diff import compare_versions

    if options.picture:
        from trainer import parity_plots  # now, so that what is not installed is told before the comparison
    test = data.load_test(dataset, obtain(dataset.name, options.data_dir, test_only=True))
    with console.status("comparing"):
        found = compare_versions(a, b, test)
    for table in (_sides(found), _classes(found)):
        console.print(table)
    console.print(f"same answer: {found.agreement:.2%} of {found.images} images; {found.verdict}", soft_wrap=True)
    _print_flips("right in A, wrong in B", found.lost, dataset.labels)
    _print_flips("wrong in A, right in B", found.gained, dataset.labels)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found.document(), indent=2) + "\n", encoding="utf-8")
        console.print(f"report: {options.json}", soft_wrap=True)
    if options.picture:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        parity_plots.flips(found, test.images.numpy(), dataset.labels).savefig(options.picture, format="png")
        console.print(f"picture: {options.picture}", soft_wrap=True)
    return 0


def _sides(found: Difference) -> Table:
    table = Table(title=f"two versions on {found.images} test images")
    for column in ("", "version", "network", "parameters", "right", "accuracy", "95 % interval"):
        table.add_column(column, justify="right" if column in ("parameters", "right", "accuracy") else "left")
    for name, side in (("A", found.a), ("B", found.b)):
        table.add_row(
            name,
            f"{side.model} {side.version}",
            side.network,
            f"{side.parameters:,}",
            f"{side.right:,}",
            f"{side.accuracy:.2%}",
            f"{side.low:.2%} to {side.high:.2%}",
        )
    return table


def _classes(found: Difference) -> Table:
    table = Table(title="right, by class")
    for column in ("class", "images", "A", "B", "change"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in found.classes:
        change = row.right_b - row.right_a
        table.add_row(row.label, str(row.images), str(row.right_a), str(row.right_b), f"{change:+d}" if change else "")
    return table


def _print_flips(title: str, flips: Sequence[Flip], labels: Sequence[str]) -> None:
    console.print(f"{title}: {len(flips)} images")
    for flip in flips[:_LISTED]:
        console.print(
            f"  image {flip.index}, {labels[flip.label]}: "
            f"A says {labels[flip.answer_a]}, B says {labels[flip.answer_b]}",
            soft_wrap=True,
        )
    if len(flips) > _LISTED:
        console.print(f"  and {len(flips) - _LISTED} more; --json lists all")
