"""The options of training as a table for the documentation: `make docs` writes it, and a test holds that it is current.

python -m trainer.reference docs/training.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from serving.options import flag, kind_of
from trainer.config import TrainConfig

BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"
_BOUNDS: dict[type[Any], tuple[str, str]] = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}


def table() -> str:
    """A line for each option: name, what it accepts, default, what it is."""
    lines = ["| option | accepts | default | what |", "|---|---|---|---|"]
    for name, field in TrainConfig.model_fields.items():
        default = None if field.default_factory else field.default
        shown = "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        lines.append(
            f"| `{flag(TrainConfig, name)}` | {_accepts(name)} | {shown} | {_escaped(field.description or '')} |"
        )
    return "\n".join(lines) + "\n"


def _accepts(name: str) -> str:
    kind = kind_of(TrainConfig, name)
    if kind is bool:
        return f"`--no-{name.replace('_', '-')}` too"
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    words = {int: "integer", float: "number", str: "text"}.get(kind, "integers with commas, or `none`")
    bounds = [
        f"{sign} {getattr(limit, key)}"
        for limit in TrainConfig.model_fields[name].metadata
        for sign, key in [_BOUNDS.get(type(limit), ("", ""))]
        if key and getattr(limit, key) < 1 << 62
    ]
    return " ".join([words, ", ".join(bounds)]).strip()


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def rewritten(document: str) -> str:
    """A document with the table between its two marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(rewritten(target.read_text(encoding="utf-8")), encoding="utf-8")
