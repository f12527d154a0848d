"""`python -m trainer ablate`: what one option changes, over several seeds, as a table and a plot."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from serving.errors import ParityserveError
from serving.options import add_options, given
from trainer import studies
from trainer.commands.parts import add_data_dir, add_sources, console, obtain, print_whole
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from trainer.ablate import Result, Row, Spread, Watcher
    from trainer.studies import Study

_LEFT = ("variant", "options")  # the others are numbers


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    command = commands.add_parser("ablate", help="compare variants of a training over several seeds")
    command.add_argument(
        "--study", metavar="NAME|PATH", help=f"what to compare: {', '.join(studies.names())}, or a TOML file"
    )
    command.add_argument(
        "--list", action="store_true", help="list the studies, or the variants of --study, and train nothing"
    )
    command.add_argument("--seeds", type=_count, default=3, metavar="N", help="seeds, from --seed on (default: 3)")
    command.add_argument(
        "--test",
        action="store_true",
        help="measure each network on the test set too; it is for the report, not for the choice",
    )
    command.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="where the trainings are kept, and taken up again (default: runs/ablation-<study>-<dataset>.json)",
    )
    command.add_argument("--markdown", type=Path, metavar="PATH", help="write the table there as well")
    command.add_argument("--plot", type=Path, metavar="PATH", help="the picture (default: beside the JSON, as .png)")
    add_sources(command)
    add_options(command, TrainConfig)
    add_data_dir(command)
    command.set_defaults(command=_ablate)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number from 1 to 100")
    return int(text)


def _ablate(options: argparse.Namespace) -> int:
    if options.study is None and not options.list:
        raise ValueError(f"--study: want one of {', '.join(studies.names())}, or the path of a .toml file; see --list")
    if options.study is None:
        _list_studies()
        return 0
    study = studies.resolve(options.study, given(TrainConfig, options), options.recipe, options.config)
    if options.list:
        console.print(_heading(study), soft_wrap=True)
        console.print(_variants(study))
        return 0
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("ablate trains in one process: start it without torchrun")
    if options.plot and options.plot.suffix != ".png":
        raise ValueError(f"--plot: got {str(options.plot)!r}, want the name of a .png file")
    from trainer import ablate, data

    file = options.json or Path("runs") / f"ablation-{study.name}-{study.dataset}.json"
    folder = obtain(study.dataset, options.data_dir)
    dataset = data.DATASETS[study.dataset]
    train, test = data.load_train(dataset, folder), data.load_test(dataset, folder) if options.test else None
    first = study.variants[0].config.seed
    seeds = range(first, first + options.seeds)
    console.print(_heading(study), soft_wrap=True)
    with _progress(file, len(study.variants) * len(seeds)) as watcher:
        results = ablate.run(study, seeds, train, test, file, watcher)
    rows = ablate.compare(study, results)
    table = _table(rows)
    print_whole(table)
    notes = _notes(study, results, len(seeds))
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)
    console.print(f"trainings: {file}", soft_wrap=True)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(_markdown(study, rows, notes), encoding="utf-8")
        console.print(f"table: {options.markdown}", soft_wrap=True)
    _draw(study, rows, options.plot or file.with_suffix(".png"), len(seeds))
    return 0


def _list_studies() -> None:
    table = Table("study", "question", "variants")
    for name in studies.names():
        study = studies.resolve(name, {})
        table.add_row(name, study.question, ", ".join(variant.name for variant in study.variants))
    console.print(table)


def _heading(study: Study) -> Text:
    base = studies.as_options(study.base)
    text = f", {study.dataset}: {study.question}" + (f" All with {base}." if base else "")
    return Text.assemble((study.name, "bold"), text)


def _variants(study: Study) -> Table:
    from trainer.models import Network, count_parameters

    table = Table("variant", "options", "parameters")
    for variant in study.variants:
        parameters = count_parameters(Network(variant.config))
        table.add_row(variant.name, studies.as_options(variant.changes), f"{parameters:,}")
    return table


@contextlib.contextmanager
def _progress(file: Path, trainings: int) -> Iterator[Watcher]:
    """A bar for the training at hand, and a line for each that is finished."""
    from trainer.ablate import Watcher

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    finished = 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("getting ready", total=None)

        def on_start(variant: str, seed: int, images: int, done: int) -> None:
            nonlocal finished
            if done and not finished:
                console.print(f"{done} of {trainings} trainings are in {file} already", soft_wrap=True)
            finished = done
            bar.reset(task, total=images, description=f"{done + 1} of {trainings}: {variant}, seed {seed}")

        def on_result(result: Result) -> None:
            nonlocal finished
            finished += 1
            bar.console.print(
                f"{finished} of {trainings}: {result.variant}, seed {result.seed}: "
                f"validation accuracy {result.validation_accuracy:.2%}, {result.seconds:.1f} s",
                soft_wrap=True,
            )

        try:
            yield Watcher(on_start, lambda images: bar.advance(task, images), on_result)
        except KeyboardInterrupt:
            kept = f"{file} has {finished} of {trainings} trainings; the same command does the rest"
            raise KeyboardInterrupt(finished and kept) from None


def _cells(row: Row) -> dict[str, str]:
    """A row of the table by column; accuracies in percent, their differences in percentage points."""
    cells = {
        "variant": row.variant,
        "options": studies.as_options(row.changes),
        "parameters": f"{row.parameters:,}",
        "training": _percent(row.train),
        "validation": _percent(row.validation),
        "difference": "",
        "clear": "",
        "seconds": _plus_minus(row.seconds, 1, 1),
        "images/s": f"{row.images_per_s:,.0f}",
    }
    if row.difference:
        error = row.difference.standard_error
        cells["difference"] = f"{row.difference.mean * 100:+.2f}" + ("" if error is None else f" ± {error * 100:.2f}")
        cells["clear"] = "yes" if row.difference.clear else "no"
    if row.test:
        cells["test"] = _percent(row.test)
    return cells


def _percent(found: Spread) -> str:
    return _plus_minus(found, 100, 2)


def _plus_minus(found: Spread, factor: float, digits: int) -> str:
    mean = f"{found.mean * factor:.{digits}f}"
    return mean if found.deviation is None else f"{mean} ± {found.deviation * factor:.{digits}f}"


def _table(rows: Sequence[Row]) -> Table:
    """Differences that may be chance are dim; nothing is emphasised."""
    table = Table()
    cells = [_cells(row) for row in rows]
    for header in cells[0]:
        table.add_column(header, justify="left" if header in _LEFT else "right", no_wrap=header not in _LEFT)
    for row in cells:
        dim = row["clear"] == "no"
        table.add_row(
            *(
                f"[dim]{text}[/dim]" if dim and header in ("difference", "clear") else escape(text)
                for header, text in row.items()
            )
        )
    return table


def _notes(study: Study, results: Sequence[Result], seeds: int) -> list[str]:
    """What the table's figures are."""
    config = study.variants[0].config
    devices = ", ".join(sorted({result.device for result in results}))
    which = f"seeds {config.seed} to {config.seed + seeds - 1}" if seeds > 1 else f"seed {config.seed}"
    notes = [
        f"{study.dataset}, {which}, on {devices}. Accuracies in percent: mean ± standard deviation over the seeds, "
        f"validation of {config.validation_images:,} images, training of as many, or all, that were learnt from.",
        "Difference: in validation to the first variant, percentage points, mean of the seeds' differences ± its "
        "standard error. Clear: chance alone would give as much in less than 5 of 100 comparisons.",
    ]
    if seeds == 1:
        notes.append("One seed says nothing about chance: compare with more --seeds.")
    return notes


def _markdown(study: Study, rows: Sequence[Row], notes: Sequence[str]) -> str:
    cells = [_cells(row) for row in rows]
    base = studies.as_options(study.base)
    lines = [study.question + (f" All with `{base}`." if base else ""), ""]
    lines.append("| " + " | ".join(cells[0]) + " |")
    lines.append("|" + "|".join("---" if header in _LEFT else "---:" for header in cells[0]) + "|")
    for row in cells:
        options = row["options"]
        written = row | {"options": f"`{options}`" if options else ""}
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in written.values()) + " |")
    return "\n".join([*lines, "", *notes]) + "\n"


def _draw(study: Study, rows: Sequence[Row], path: Path, seeds: int) -> None:
    try:
        from trainer import pictures, plots
    except ParityserveError as error:
        console.print(f"no plot was drawn: {error}", soft_wrap=True)
        return
    costs: dict[str, list[float]] = {"seconds of training": [row.seconds.mean for row in rows]}
    if len({row.parameters for row in rows}) > 1:
        costs = {"parameters": [row.parameters for row in rows], **costs}
    title = f"{study.question}\n{study.dataset}, {seeds} seed{'s' if seeds > 1 else ''}"
    figure = plots.comparison([row.variant for row in rows], [row.accuracies for row in rows], costs, title)
    (written,) = pictures.write(path.parent, [(path.stem, figure)])
    console.print(f"plot: {written}", soft_wrap=True)
