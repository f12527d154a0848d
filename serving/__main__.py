"""`python -m serving serve | predict | models | promote | labels | conformance | doctor`: the command line.

Exit codes: 0 done; 1 the server, a model or the machine is at fault; 2 the command or its files are.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from serving import logs, sources, version_labels
from serving.config import DEFAULT_TARGET, ServerConfig
from serving.credentials import add_credentials
from serving.errors import ParityserveError, in_words
from serving.images import Polarity
from serving.machine import worker_count
from serving.options import add_options, given
from serving.workers import supervise

logger = logging.getLogger("serving")  # __name__ is __main__ here


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ParityserveError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {in_words(error)}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m serving`."""
    top = argparse.ArgumentParser(prog="python -m serving", description="Serve exported models over gRPC.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve the models in a repository")
    serve.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help=f"TOML file with settings; flags and PARITYSERVE_* come before it (default: ${sources.CONFIG_VARIABLE})",
    )
    serve.add_argument(
        "--show-config", action="store_true", help="print every setting with its value and source, and do not serve"
    )
    add_options(serve, ServerConfig)
    serve.set_defaults(command=_serve)

    predict = commands.add_parser("predict", help="classify picture files on a running server")
    predict.add_argument("files", nargs="+", metavar="FILE", help="PNG, JPEG, WebP, GIF or BMP, of any size")
    predict.add_argument("--model", default="", help="its name; needed when the server has several")
    predict.add_argument("--version", default="", help="a number or a label; stable when not given, or the newest")
    predict.add_argument("--top-k", type=_count, default=3, metavar="N", help="classes to list (default: 3)")
    predict.add_argument(
        "--polarity",
        choices=[polarity.name.lower().replace("_", "-") for polarity in Polarity],
        default="auto",
        help="light-on-dark as the data sets are, dark-on-light as ink on paper (default: auto, from the border)",
    )
    _add_server(predict)
    predict.set_defaults(command=_predict)

    models = commands.add_parser("models", help="list the models of a running server")
    models.add_argument("--verbose", action="store_true", help="also how each is run: threads, the provider's options")
    _add_server(models)
    models.set_defaults(command=_models)

    promote = commands.add_parser("promote", help="give a version a label, which servers of the repository follow")
    promote.add_argument("model", metavar="MODEL", help="its name")
    promote.add_argument("version", metavar="VERSION", nargs="?", type=int, help="its number; not with --remove")
    promote.add_argument("--label", required=True, metavar="TEXT", help="stable, canary or any other name")
    promote.add_argument("--remove", action="store_true", help="take the label away")
    _add_repository(promote)
    promote.set_defaults(command=_promote)

    labels = commands.add_parser("labels", help="the labels of a model's versions in a repository")
    labels.add_argument("model", metavar="MODEL", help="its name")
    _add_repository(labels)
    labels.set_defaults(command=_labels)

    conformance = commands.add_parser(
        "conformance", help="check any server against the Open Inference Protocol; 1 when it breaks a rule"
    )
    conformance.add_argument(
        "target",
        metavar="HOST:PORT",
        help="the server, which is asked in plain text and without a token; others should not use it meanwhile",
    )
    conformance.add_argument("--model", default="", help="its name; the first that is ready when not given")
    conformance.add_argument("--json", type=Path, metavar="PATH", help="write the report there too")
    conformance.set_defaults(command=_conformance)

    doctor = commands.add_parser("doctor", help="what this machine can serve with, and why not with the rest")
    doctor.set_defaults(command=_doctor)
    return top


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**31):
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number from 1 up")
    return int(text)


def _add_repository(command: argparse.ArgumentParser) -> None:
    add_options(command, ServerConfig, ["repository"])


def _add_server(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--server", default=DEFAULT_TARGET, metavar="HOST:PORT", help=f"the server (default: {DEFAULT_TARGET})"
    )
    add_credentials(command)


def _serve(options: argparse.Namespace) -> int:
    config, origins = sources.load(given(ServerConfig, options), os.environ, options.config)
    logs.configure(config)
    for warning in sources.unknown_variables(os.environ):
        logger.warning("%s", warning)
    if options.show_config:
        print(sources.show(config, origins))  # noqa: T201
        return 0
    try:
        count = worker_count(config)
        if count > 1:
            supervise(config, count)
        else:
            from serving.server import serve  # no other command needs ONNX Runtime, nor does a supervisor

            serve(config)
    except ParityserveError as error:
        if config.log_format == "text":
            raise
        logger.critical("%s", error)  # where programs read the log, its last line is for them too
        return 1
    return 0


def _predict(options: argparse.Namespace) -> int:
    from serving.asking import predict  # a server needs neither a client nor tables, and starts without them

    return predict(options)


def _models(options: argparse.Namespace) -> int:
    from serving.asking import models

    return models(options)


def _promote(options: argparse.Namespace) -> int:
    if (options.version is None) != options.remove:
        raise ValueError("promote: give a VERSION to promote, or --remove and no VERSION")
    repository = _repository(options)
    if options.remove:
        _print_labels(version_labels.remove(repository, options.model, options.label))
    else:
        _print_labels(version_labels.promote(repository, options.model, options.version, options.label))
    return 0


def _labels(options: argparse.Namespace) -> int:
    _print_labels(version_labels.of(_repository(options), options.model))
    return 0


def _repository(options: argparse.Namespace) -> Path:
    return sources.load(given(ServerConfig, options), os.environ)[0].repository


def _print_labels(labels: Mapping[str, int]) -> None:
    for label, number in sorted(labels.items()):
        print(f"{label} {number}")  # noqa: T201


def _conformance(options: argparse.Namespace) -> int:
    from rich.console import Console

    from serving.conformance.suite import run  # no other command needs it

    report = run(options.target, options.model)
    report.print(Console(highlight=False))
    if options.json:
        report.write_json(options.json)
    return 1 if report.violations else 0


def _doctor(options: argparse.Namespace) -> int:  # noqa: ARG001
    from rich.console import Console

    from serving.doctor import doctor

    return 0 if doctor(Console()) else 1


if __name__ == "__main__":
    sys.exit(main())
