"""The training's configuration from its sources: options, then a file of one's own, then a recipe, then defaults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from serving.options import build, check_keys, flag, near, read_toml
from trainer.config import TrainConfig

RECIPES = Path(__file__).with_name("recipes")


def names(folder: Path) -> list[str]:
    """The names of the TOML files of a folder that comes with the package."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return names(RECIPES)


def file_of(option: str, value: str, folder: Path) -> Path:
    """The file that an option names: by the name of one in `folder`, or by the path of a TOML file.

    Raises:
        ValueError: there is none of that name.
    """
    known = names(folder)
    if value in known:
        return folder / f"{value}.toml"
    if value.endswith(".toml"):
        return Path(value)
    raise ValueError(
        f"{option}: got {value!r}{near(value, known)}, want one of {', '.join(known)}, or the path of a .toml file"
    )


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
    values, names = gather(options, recipe, file)
    return build(TrainConfig, {**(saved or {}), **values}, names)


def gather(
    options: Mapping[str, Any], recipe: str | None = None, file: Path | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `resolve` builds the configuration from: the values that were given, and what to call each in an error.

    Raises:
        ValueError: there is no such recipe, or a file is not what it should be.
        OSError: the file cannot be read.
    """
    values: dict[str, Any] = {}
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
    return values, names


def _read(file: Path) -> dict[str, Any]:
    if file.suffix != ".json":
        return read_toml(TrainConfig, file)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    values = manifest.get("training") if isinstance(manifest, dict) else None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: not the manifest of an exported version: it has no training options")
    check_keys(TrainConfig, values, file)
    return values


def as_toml(config: TrainConfig, comments: Iterable[str] = ()) -> str:
    """A recipe that gives `config` wherever it runs: the data set, and each option that is not at its default.

    Args:
        config: what to write; its `device` and `stream` are left out.
        comments: lines to begin with.
    """
    values = config.model_dump(mode="json")
    lines = [f"# {comment}" for comment in comments]
    for name, field in TrainConfig.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data=config.model_dump())
        if name == "dataset" or (getattr(config, name) != default and name not in ("device", "stream")):
            # JSON's texts, numbers and lists of these are TOML's.
            lines.append(f"{name} = {json.dumps(values[name], ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
