"""The table of a configuration's options in a page of the documentation: `make docs` writes them."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from serving.options import flag, kind_of

_ENDS = "<!-- The end of what is made. -->"
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def write(page: Path | str, model: type[BaseModel]) -> None:
    """Write the table of every field of `model` into a Markdown page, between its two markers."""
    begins = f"<!-- Made by `make docs` from {model.__module__.replace('.', '/')}.py. -->"
    page = Path(page)
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begins)
    _, _, after = rest.partition(_ENDS)
    page.write_text(f"{before}{begins}\n\n{_table(model)}\n\n{_ENDS}{after}", encoding="utf-8")


def _table(model: type[BaseModel]) -> str:
    lines = ["| key | flag | accepted | default | what |", "|---|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (
            f"`{name}`",
            f"`{flag(model, name)}`",
            _accepted(model, name),
            # Where the default is made from other fields, the description tells.
            "" if field.default_factory or field.default in (None, ()) else f"`{_plain(field.default)}`",
            (field.description or "").replace("<", "&lt;"),
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _accepted(model: type[BaseModel], name: str) -> str:
    """What an option may be, in words, from its type and bounds."""
    kind = kind_of(model, name)
    if get_origin(kind) is Literal:
        return " ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) is tuple:
        return "list of text" if str in get_args(kind) else "list of integers"
    if get_origin(kind) in (types.UnionType, Union):
        words, number = get_args(kind)
        return f"`{get_args(words)[0]}` or integer{_bounds(get_args(number)[1:])}"
    words = {bool: "boolean", int: "integer", float: "number", Path: "path"}.get(kind, "text")
    return words + _bounds(model.model_fields[name].metadata)


def _bounds(metadata: Iterable[Any]) -> str:
    """Such as ` ≥ 1`, of each of a field's limits."""
    limits = [limit for entry in metadata for limit in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    found = [(sign, getattr(limit, word, None)) for limit in limits for word, sign in _SIGNS.items()]
    return "".join(f" {sign} {number}" for sign, number in found if number is not None)
