"""Command-line options and keys of files made from the fields of a pydantic model: defaults and help stand once."""

from __future__ import annotations

import argparse
import difflib
import tomllib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)

_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", tuple[int, ...]: "N,N"}


def add_options(parser: argparse.ArgumentParser, model: type[BaseModel], names: list[str] | None = None) -> None:
    """Give `parser` one `--option` for each field of `model` (or for those named), with its description and default.

    The parser only splits the words; `parse` has the model judge the values. An option that is not given is absent
    from the namespace, so that other sources (environment, per-dataset defaults) can speak.
    """
    for name, field in model.model_fields.items():
        if names is not None and name not in names:
            continue
        # None where it is made from other fields, and the description tells.
        default = None if field.default_factory else field.get_default()
        help_text = f"{field.description} (default: {default})" if default is not None else field.description
        arguments: dict[str, Any] = {"help": (help_text or "").replace("%", "%%"), "default": argparse.SUPPRESS}
        kind = kind_of(model, name)
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            arguments |= {"choices": get_args(kind), "type": type(get_args(kind)[0])}
        elif _repeated(kind):
            arguments |= {"action": "append", "metavar": name.rstrip("s").upper()}
        elif get_origin(kind) in (types.UnionType, Union):  # of a word and a number
            arguments["metavar"] = "N|auto"
        else:
            arguments["metavar"] = _METAVARS.get(kind, "PATH")
        parser.add_argument(flag(model, name), dest=name, **arguments)


def kind_of(model: type[BaseModel], name: str) -> Any:
    """A field's type, without the None of one that may be left out."""
    kind = model.model_fields[name].annotation
    parts = [part for part in get_args(kind) if part is not type(None)]
    return parts[0] if get_origin(kind) in (types.UnionType, Union) and len(parts) == 1 else kind


def flag(model: type[BaseModel], name: str) -> str:
    """A field's option: that of several texts is given once for each of them, and so is singular."""
    return "--" + (name.rstrip("s") if _repeated(kind_of(model, name)) else name).replace("_", "-")


def _repeated(kind: Any) -> bool:
    """Whether an option is given once for each value: texts are, numbers stand in one word with commas."""
    return get_origin(kind) is tuple and str in get_args(kind)


def given(model: type[BaseModel], namespace: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, by field."""
    return {name: value for name, value in vars(namespace).items() if name in model.model_fields}


def parse(model: type[Model], namespace: argparse.Namespace, **defaults: Any) -> Model:
    """Build `model` from the options that were given.

    Raises:
        ValueError: an option's value is not accepted; the text names the option, the value and what is accepted.
    """
    flags = {name: flag(model, name) for name in model.model_fields}
    return build(model, {**defaults, **given(model, namespace)}, flags)


def build(model: type[Model], values: Mapping[str, Any], names: Mapping[str, str]) -> Model:
    """Build `model`, and name each value that is not accepted as `names` has it for its field.

    Raises:
        ValueError: a value is not accepted; the text has each such name, the value and what is accepted.
    """
    try:
        return model(**values)
    except ValidationError as error:
        lines: list[str] = []
        wrong: dict[tuple[str, str], list[str]] = {}  # by field and what was got there: what is accepted instead
        for problem in error.errors():
            if problem["type"] == "default_factory_not_called":
                continue  # only says that another field is wrong
            if problem["loc"]:
                name = str(problem["loc"][0])
                texts = wrong.setdefault((names.get(name, name), repr(problem["input"])), [])
                texts.append(_in_words(model, name, problem))
            else:  # of the fields together: the text names them
                lines.append(problem["msg"].removeprefix("Value error, "))
        named = [f"{name}: {' or '.join(dict.fromkeys(texts))}, got {got}" for (name, got), texts in wrong.items()]
        raise ValueError("; ".join(named + lines)) from error


def _in_words(model: type[BaseModel], name: str, problem: ErrorDetails) -> str:
    """What is wrong with a value, where pydantic's own text speaks to who wrote the model."""
    match problem["type"]:
        case "string_pattern_mismatch":
            *others, last = model.model_fields[name].examples or ["something else"]
            return f"Input should be {', '.join(map(str, others))}{' or ' * bool(others)}{last}"
        case "tuple_type":
            return "Input should be a list"
        case "path_type":
            return "Input should be a path"
    return problem["msg"].removeprefix("Value error, ")


def read_toml(model: type[BaseModel], file: Path) -> dict[str, Any]:
    """The values in a TOML file with one key a field of `model`.

    Raises:
        ValueError: it is not TOML, or has an unknown key; the text names the nearest known ones.
        OSError: it cannot be read.
    """
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not TOML: {error}") from error
    check_keys(model, values, file)
    return values


def check_keys(model: type[BaseModel], values: Mapping[str, Any], file: Path) -> None:
    """Refuse a file's keys that are no field of `model`.

    Raises:
        ValueError: there are some; the text names the nearest known ones.
    """
    unknown = [f"{name}{near(name, model.model_fields)}" for name in values if name not in model.model_fields]
    if unknown:
        raise ValueError(f"{file}: no such setting: {', '.join(unknown)}; --help lists them all, with dashes for _")


def near(name: str, known: Iterable[str]) -> str:
    """The known names that `name` may have been meant as, in brackets."""
    found = difflib.get_close_matches(name.replace("-", "_"), known, n=2)
    return f" (did you mean {' or '.join(found)}?)" if found else ""
