"""Command-line options made from the fields of a pydantic model, so that defaults, bounds and help stand once."""

from __future__ import annotations

import argparse
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)

_METAVARS: dict[Any, str] = {int: "N", int | None: "N", float: "X", str: "TEXT", str | None: "TEXT"}


def add_options(parser: argparse.ArgumentParser, model: type[BaseModel], names: list[str] | None = None) -> None:
    """Give `parser` one `--option` for each field of `model` (or for those named), with its description and default.

    The parser only splits the words; `parse` has the model judge the values. An option that is not given is absent
    from the namespace, so that other sources (environment, per-dataset defaults) can speak.
    """
    for name, field in model.model_fields.items():
        if names is not None and name not in names:
            continue
        default = field.get_default()  # None where it is made from other fields, and the description tells
        help_text = f"{field.description} (default: {default})" if default is not None else field.description
        arguments: dict[str, Any] = {"help": (help_text or "").replace("%", "%%"), "default": argparse.SUPPRESS}
        kind = field.annotation
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            arguments["choices"] = get_args(kind)
        elif get_origin(kind) is tuple:
            arguments |= {"action": "append", "metavar": name.rstrip("s").upper()}
        else:
            arguments["metavar"] = _METAVARS.get(kind, "PATH")
        parser.add_argument(f"--{_flag(model, name)}", dest=name, **arguments)


def _flag(model: type[BaseModel], name: str) -> str:
    """A field's option: that of a tuple is given once for each of its values, and so is singular."""
    repeated = get_origin(model.model_fields[name].annotation) is tuple
    return (name.rstrip("s") if repeated else name).replace("_", "-")


def parse(model: type[Model], namespace: argparse.Namespace, **defaults: Any) -> Model:
    """Build `model` from the options that were given.

    Raises:
        ValueError: an option's value is not accepted; the text names the option, the value and what is accepted.
    """
    given = {name: value for name, value in vars(namespace).items() if name in model.model_fields}
    try:
        return model(**{**defaults, **given})
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            option = f"--{_flag(model, name)}: " if name else ""
            lines.append(f"{option}{problem['msg']}, got {problem['input']!r}")
        raise ValueError("; ".join(lines)) from error
