"""The training's configuration from its sources: options, then a file of one's own, then a recipe, then defaults."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.options import build, flag
from trainer.config import TrainConfig

RECIPES = Path(__file__).with_name("recipes")


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def resolve(
    options: Mapping[str, Any],
    recipe: str | None = None,
    file: Path | None = None,
    saved: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Build the configuration; what is named first counts most.

    Args:
        options: those that were given.
        recipe: one of `recipes()`.
        file: TOML with one key an option, or the manifest.json of an exported version, whose training it repeats.
        saved: the configuration of a training that is resumed.

    Raises:
        ValueError: a value is not accepted, options contradict each other, or a file is not what it should be.
        OSError: the file cannot be read.
    """
    values: dict[str, Any] = {**(saved or {})}
    names: dict[str, str] = {name: name for name in TrainConfig.model_fields}
    if recipe is not None:
        if recipe not in recipes():
            raise ValueError(f"--recipe: got {recipe!r}, want one of {', '.join(recipes())}")
        found = _read(RECIPES / f"{recipe}.toml")
        values |= found
        names |= {name: f"recipe {recipe}: {name}" for name in found}
    if file is not None:
        found = _read(file)
        values |= found
        names |= {name: f"{file}: {name}" for name in found}
    values |= options
    names |= {name: flag(TrainConfig, name) for name in options}
    return build(TrainConfig, values, names)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text).get("training") if file.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not {'JSON' if file.suffix == '.json' else 'TOML'}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"{file}: not a version's manifest") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: not a version's manifest: it has no training configuration")
    unknown = [_near(name) for name in values if name not in TrainConfig.model_fields]
    if unknown:
        raise ValueError(f"{file}: no such option: {', '.join(unknown)}; --help lists them all, with dashes for _")
    return values


def _near(name: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), TrainConfig.model_fields, n=2)
    return f"{name} (did you mean {' or '.join(near)}?)" if near else name
