"""`python -m trainer search`: arguments, a line a trial, and what is written at the end."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from serving.errors import ParityserveError
from serving.options import add_options, flag, given
from trainer import sources, space
from trainer.commands.parts import add_data_dir, add_sources, console, obtain
from trainer.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from trainer.search import Outcome, Search, Watcher

SHOWN = 5  # trials in the table


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    search = commands.add_parser(
        "search",
        help="find better options by training with many; judged on validation images",
        description="Find better options by training with many, judged on the validation images. All that is not "
        "varied is as for train. Started again, it goes on; started several times at once, the processes share the "
        "study, and each adds its trials.",
    )
    search.add_argument(
        "--trials",
        type=_count,
        default=20,
        metavar="N",
        help="trainings to add to the study; 0 to report what it has (default: 20)",
    )
    search.add_argument(
        "--space",
        default="default",
        metavar="NAME|PATH",
        help=f"what is varied: {', '.join(space.spaces())}, or a TOML file with choices or a range for each option "
        "(default: default)",
    )
    search.add_argument(
        "--study",
        type=Path,
        metavar="PATH",
        help="the SQLite file; the recipe and the pictures go beside it (default: runs/search-<dataset>.db)",
    )
    add_sources(search)
    add_options(search, TrainConfig)
    add_data_dir(search)
    search.set_defaults(command=_search)


def _count(text: str) -> int:
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"got {text!r}, want 0 or more; 0 reports what the study has")


def _search(options: argparse.Namespace) -> int:
    plan = space.plan(options.space, given(TrainConfig, options), options.recipe, options.config)
    dataset = plan.example.dataset
    path = options.study or Path("runs") / f"search-{dataset}.db"
    from trainer import data
    from trainer.search import Search, SearchError

    if not options.trials and not path.exists():
        raise SearchError(f"{path} is missing: there is nothing to report")
    search = Search(plan, path)
    with contextlib.closing(search):
        if options.trials:
            folder = obtain(dataset, options.data_dir)
            train = data.load_train(data.DATASETS[dataset], folder)
            console.print(f"study: {path}, {len(search.outcomes)} trials so far", soft_wrap=True)
            with _told(search, options.trials) as watcher:
                search.run(train, options.trials, watcher)
        return _report(search)


@contextlib.contextmanager
def _told(search: Search, trials: int) -> Iterator[Watcher]:
    """A progress bar for the trial that is trained, and a line for each that has ended."""
    from trainer.progress import progress_bar
    from trainer.search import Watcher

    with progress_bar(console) as bar:
        task = bar.add_task("starting", total=None)
        ended = 0

        def on_device(device: torch.device, why: str) -> None:
            bar.console.print(f"on {device} ({why}), seed {search.plan.example.seed}", soft_wrap=True)

        def on_start(number: int, images: int) -> None:
            bar.reset(task, description=f"trial {number}, {ended + 1} of {trials} here", total=images)

        def on_end(outcome: Outcome) -> None:
            nonlocal ended
            ended += 1
            bar.console.print(_line(outcome, search), soft_wrap=True, highlight=False)

        try:
            yield Watcher(on_device, on_start, lambda images: bar.advance(task, images), on_end=on_end)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{search.path} keeps the {ended} trials of this run that had ended; the same command adds others"
            ) from None


def _line(outcome: Outcome, search: Search) -> str:
    """What became of a trial."""
    what = outcome.reason
    if outcome.accuracy is not None:
        what = f"{outcome.accuracy:.2%} in {outcome.seconds:.1f} s"
    if outcome.state != "finished":
        after = f" after epoch {outcome.epochs}" if outcome.epochs else ""
        what = f"{outcome.state}{after}: {what}"
    elif search.ranking[0].number == outcome.number:
        what += ", the best so far"
    return f"trial {outcome.number}: {what}: {_changes(outcome)}"


def _changes(outcome: Outcome) -> str:
    return ", ".join(f"{name} {space.told(value)}" for name, value in outcome.options.items())


def _report(search: Search) -> int:
    """Show the best trials, write the recipe and the pictures."""
    ranking, outcomes = search.ranking, search.outcomes
    if not ranking:
        raise ParityserveError(f"{search.path}: none of its {len(outcomes)} trials was trained to the end")
    trials = f"{len(outcomes)} trial" + "s" * (len(outcomes) > 1)
    table = Table(title=f"the best of {trials}", title_justify="left")
    for column in ("trial", "accuracy", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("options")
    for outcome in ranking[:SHOWN]:
        seconds = f"{outcome.seconds:.1f}"
        table.add_row(str(outcome.number), f"{outcome.accuracy:.2%}", seconds, _changes(outcome))
    console.print(table)
    config = search.plan.config(ranking[0].options)
    recipe = _write_recipe(search, config, ranking[0], trials)
    console.print(f"recipe: {recipe}", soft_wrap=True)
    _draw(search)
    device = "" if config.device == "auto" else f" --device {config.device}"
    console.print(f"python -m trainer train --config {shlex.quote(str(recipe))}{device}", soft_wrap=True)
    return 0


def _write_recipe(search: Search, config: TrainConfig, best: Outcome, trials: str) -> Path:
    """Write the best trial's configuration beside the study, complete or not at all."""
    path = search.path.with_suffix(".toml")
    comments = (
        f"The best of {trials} in {search.path.name}: trial {best.number}, {best.accuracy:.2%} of "
        f"{config.validation_images:,} validation images.",
        f"Varied: {', '.join(flag(TrainConfig, name) for name in search.plan.space)}.",
    )
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        draft.write_text(sources.as_toml(config, comments), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path


def _draw(search: Search) -> None:
    """The pictures of the study; a search is complete without them."""
    try:
        from trainer import pictures, search_plots
    except ParityserveError as error:
        console.print(f"no pictures were drawn: {error}", soft_wrap=True)
        return
    name, ranking = search.path.stem, search.ranking
    figures = {f"{name}-history": search_plots.history(search.outcomes, f"Trials of {name}")}
    try:
        parts, best = search.importance()
    except ValueError as error:
        console.print(f"no picture of the options' importance: {error}", soft_wrap=True)
    else:
        figures[f"{name}-importance"] = search_plots.importance(parts, best, len(ranking), f"Options in {name}")
    for path in pictures.write(search.path.parent, figures.items()):
        console.print(f"picture: {path}", soft_wrap=True)
