"""What several commands have in common: their options, and how they obtain a data set."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from serving.errors import BundleError
from trainer import sources

if TYPE_CHECKING:
    from serving.bundle import Bundle
    from trainer.data import Dataset

EXAMPLES = [0, 1, 2]  # test images whose feature maps are drawn unless told otherwise

console = Console(markup=False, emoji=False)  # paths and errors may have square brackets, and colons


def add_data_dir(command: argparse.ArgumentParser) -> None:
    """Give a command the option that says where data sets are kept."""
    command.add_argument(
        "--data-dir",
        type=Path,
        metavar="PATH",
        help="where data sets are kept (default: $PARITYSERVE_DATA_DIR, else the user's cache folder)",
    )


def add_sources(command: argparse.ArgumentParser) -> None:
    """Give a command the options that name a recipe and a file of options; `trainer.sources` reads them."""
    command.add_argument("--recipe", choices=sources.recipes(), help="options that go together; others change them")
    command.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="TOML file with options, or the manifest.json of an exported version, to repeat its training",
    )


def print_whole(table: Table) -> None:
    """Print a table at its full width: a narrow terminal breaks its lines, and loses nothing."""
    wide = Console(width=1000, emoji=False)
    whole = Measurement.get(wide, wide.options, table).maximum
    wide.width = max(whole, console.width)
    wide.print(table)


def obtain(dataset_name: str, data_dir: Path | None, *, test_only: bool = False) -> Path:
    """Have the data set's files in a folder, or only those of its test set; says where they came from."""
    from trainer import data  # with torch, for which --help need not wait

    folder = data_dir or data.default_data_dir()
    dataset = data.DATASETS[dataset_name]
    if test_only:
        dataset = dataset.test_only()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(f"looking for {dataset_name}", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        source = data.obtain(dataset, folder, show)
    console.print(
        f"data: {dataset_name}, {len(dataset.sha256)} files with the right sha256, from {source}", soft_wrap=True
    )
    return folder


def known_dataset(bundle: Bundle) -> Dataset:
    """The data set that a version was trained on.

    Raises:
        BundleError: it is none of ours.
    """
    from trainer import data

    name = bundle.manifest.dataset
    if name not in data.DATASETS:
        raise BundleError(f"{bundle.path}: its data set is {name!r}, want one of {', '.join(data.DATASETS)}")
    return data.DATASETS[name]
