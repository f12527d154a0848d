"""`python -m trainer COMMAND`: arguments, logging, progress, exit codes.

Exit codes: 0 done; 1 it failed, or a parity row did; 2 the command is wrong; 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from rich.logging import RichHandler

from serving.errors import ParityserveError, in_words
from serving.options import add_options, given, parse
from trainer import sources
from trainer.commands import ablate, diff, export, parity, search
from trainer.commands.parts import EXAMPLES, add_data_dir, add_sources, console, obtain
from trainer.config import DatasetName, NetworkConfig, TrainConfig
from trainer.memory import keep_freed_memory


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    keep_freed_memory()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_time=False)])
    try:
        return int(options.command(options))
    except ParityserveError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("trainer", "serving", "protos"):  # a fault of ours
            raise
        print(f"error: {error.name} is not installed: pip install 'parityserve[train]'", file=sys.stderr)  # noqa: T201
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt as interrupt:
        (kept,) = interrupt.args or (None,)
        print(f"stopped; {kept or 'nothing was written'}", file=sys.stderr)  # noqa: T201
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m trainer`."""
    top = argparse.ArgumentParser(
        prog="python -m trainer", description="Train the network, export it, and prove that the exports answer like it."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    data = commands.add_parser("data", help="obtain a data set and verify it")
    add_options(data, TrainConfig, ["dataset"])
    add_data_dir(data)
    data.set_defaults(command=_data)

    train = commands.add_parser("train", help="train the network and write a checkpoint")
    add_sources(train)
    add_options(train, TrainConfig)
    train.add_argument("--checkpoint", type=Path, metavar="PATH", help="the file to write (default: runs/<dataset>.pt)")
    train.add_argument(
        "--resume", action="store_true", help="go on after the last finished epoch of the training that was interrupted"
    )
    train.add_argument(
        "--tensorboard",
        type=Path,
        nargs="?",
        const=Path("runs/tensorboard"),
        metavar="PATH",
        help="write event files into a new folder in PATH (runs/tensorboard when it is left out)",
    )
    add_data_dir(train)
    train.set_defaults(command=_train)

    summary = commands.add_parser("summary", help="list the layers of a network with shapes, parameters and mult-adds")
    add_sources(summary)
    add_options(summary, TrainConfig, list(NetworkConfig.model_fields))
    summary.set_defaults(command=_summary)

    ablate.add(commands)
    search.add(commands)

    export.add(commands)
    parity.add(commands)
    diff.add(commands)

    plots = commands.add_parser("plots", help="draw how a network was trained, where it errs and what its layers see")
    subject = plots.add_mutually_exclusive_group(required=True)
    subject.add_argument("--bundle", type=Path, metavar="PATH", help="a version's folder, or a model's for its newest")
    subject.add_argument("--checkpoint", type=Path, metavar="PATH", help="what train wrote")
    plots.add_argument(
        "--images",
        type=_numbers,
        default=EXAMPLES,
        metavar="N,N,...",
        help=f"the test images whose feature maps are drawn (default: {','.join(map(str, EXAMPLES))})",
    )
    plots.add_argument(
        "--output",
        type=Path,
        metavar="PATH",
        help="the folder to write (default: plots/<version> beside the bundle, <name>-plots beside a checkpoint)",
    )
    add_data_dir(plots)
    plots.set_defaults(command=_plots)

    doctor = commands.add_parser("doctor", help="what this machine can train with, and why not with the rest")
    add_data_dir(doctor)
    doctor.set_defaults(command=_doctor)
    return top


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, want numbers with commas between, such as 0,7") from None


# The commands import what they need themselves: `--help` and a wrong option answer without waiting for torch.


def _data(options: argparse.Namespace) -> int:
    from trainer import data

    name: DatasetName = parse(TrainConfig, options).dataset
    folder = obtain(name, options.data_dir)
    train, test = data.load(data.DATASETS[name], folder)
    console.print(f"data: {len(train)} training and {len(test)} test images in {folder / name}", soft_wrap=True)
    return 0


def _train(options: argparse.Namespace) -> int:
    given_options = given(TrainConfig, options)
    config = sources.resolve(given_options, options.recipe, options.config)
    from trainer import data, processes, progress, runs

    if options.tensorboard:
        from trainer import events, pictures  # now, so that what is not installed is told before the training
    files = runs.Files(options.checkpoint or Path("runs") / f"{config.dataset}.pt")
    if files.result.is_dir():  # before the training, not after
        raise ValueError(f"--checkpoint: {files.result} is a folder, want the file to write")
    if options.resume:
        config = sources.resolve(given_options, options.recipe, options.config, runs.saved_options(files))
    with processes.join(config.device) as together:
        if together.first:
            obtain(config.dataset, options.data_dir)
        together.wait()
        splits = data.load(data.DATASETS[config.dataset], options.data_dir or data.default_data_dir())
        writer = None
        if options.tensorboard and together.first:
            writer = events.EventWriter(options.tensorboard, config.dataset)
        with progress.training(console, config, together) as watcher:
            if writer:
                watcher = writer.following(watcher)
            trained = runs.run(config, splits, files, resume=options.resume, watcher=watcher, processes=together)
    if together.first:
        console.print(
            f"test accuracy: {trained.test_accuracy:.2%} of {trained.test_images} images, seed {config.seed}",
            style="bold",
        )
        console.print(f"checkpoint: {files.result}", soft_wrap=True)
    if writer:
        subject = pictures.of_checkpoint(trained, files.result)
        writer.pictures(pictures.figures(subject, splits[1], EXAMPLES))
        writer.close()
        console.print(f"events: tensorboard --logdir {options.tensorboard}", soft_wrap=True)
    return 0


def _summary(options: argparse.Namespace) -> int:
    config = sources.resolve(given(TrainConfig, options), options.recipe, options.config)
    from trainer.summary import layer_table

    print(layer_table(config))  # noqa: T201
    return 0


def _plots(options: argparse.Namespace) -> int:
    from serving.bundle import newest, open_bundle
    from trainer import checkpoint, data, pictures

    if options.bundle:
        subject = pictures.of_bundle(open_bundle(newest(options.bundle)))
    else:
        subject = pictures.of_checkpoint(checkpoint.load(options.checkpoint), options.checkpoint)
    test = data.load_test(data.DATASETS[subject.dataset], obtain(subject.dataset, options.data_dir, test_only=True))
    paths = pictures.write(options.output or subject.folder, pictures.figures(subject, test, options.images))
    for path in paths:
        console.print(path, soft_wrap=True)
    drawn = {path.stem for path in paths}
    if "curves" not in drawn:
        console.print("no curves: what this network was exported from had no history, or it was not kept then")
    if options.images and not any(name.startswith("feature-maps") for name in drawn):
        console.print("no feature maps: this network has no convolution")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from trainer.doctor import doctor

    return 0 if doctor(Console(), options.data_dir) else 1


if __name__ == "__main__":
    sys.exit(main())
