"""Studies of what an option, or a few together, change: small TOML files; `trainer/ablations/` has those that are ours.

A file has a `question`, perhaps a table `base` of options that all its trainings share, and a table `variants` with a
table of options for each of them. The first variant is what the others are compared with.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.options import build, flag, near
from trainer import sources
from trainer.config import TrainConfig

FOLDER = Path(__file__).with_name("ablations")

# What the variants of a comparison must have in common. The seeds are those of the command.
_SHARED = ("dataset", "validation_images", "seed")


@dataclass(frozen=True)
class Variant:
    """One of the trainings that are compared, whatever its seed."""

    name: str
    changes: dict[str, Any]  # the options that make it what it is
    config: TrainConfig  # all of them


@dataclass(frozen=True)
class Study:
    """Trainings to compare, and why."""

    name: str
    question: str
    base: dict[str, Any]  # the options that were chosen for all variants
    variants: tuple[Variant, ...]

    @property
    def dataset(self) -> str:
        """Whose images all variants learn."""
        return self.variants[0].config.dataset


def names() -> list[str]:
    """The studies that come with the package."""
    return sources.names(FOLDER)


def resolve(study: str, options: Mapping[str, Any], recipe: str | None = None, file: Path | None = None) -> Study:
    """Read a study and build the configuration of every variant; what is named first counts most:

    the variant's options, `options`, those of `file`, those of `recipe`, the study's base, the defaults.

    Args:
        study: as for `sources.file_of`.
        options: those that were given for all variants.
        recipe: as for `sources.resolve`.
        file: as for `sources.resolve`.

    Raises:
        ValueError: the file is not a study, or a variant cannot be trained; the text has all that is wrong with any.
        OSError: a file cannot be read.
    """
    path = sources.file_of("--study", study, FOLDER)
    question, base, variants = _read(path)
    values, labels = sources.gather(options, recipe, file)
    labels |= {name: f"{path}: base: {name}" for name in base if name not in values}
    values = {**base, **values}
    idle = [flag(TrainConfig, name) for name in options if all(name in changes for changes in variants.values())]
    if idle:
        raise ValueError(f"{', '.join(idle)} would change nothing: every variant of {path.stem} sets it itself")
    found: list[Variant] = []
    problems: dict[str, list[str]] = {}
    for name, changes in variants.items():
        own = {key: f"{path}: variant {name!r}: {key}" for key in changes}
        try:
            config = build(TrainConfig, {**values, **changes}, {**labels, **own})
        except ValueError as error:
            problems.setdefault(str(error), []).append(name)
        else:
            found.append(Variant(name, dict(changes), config))
    if problems:
        raise ValueError("\n".join(_told(path, text, named, len(variants)) for text, named in problems.items()))
    _check(path, found)
    return Study(path.stem, question, {key: value for key, value in values.items() if key not in _SHARED}, tuple(found))


def as_options(options: Mapping[str, Any]) -> str:
    """Options as a command line has them: `--channels 16,32 --batch-norm`."""
    words = []
    for name, value in options.items():
        option = flag(TrainConfig, name)
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list | tuple):
            words.append(f"{option} {','.join(map(str, value)) or 'none'}")
        else:
            words.append(f"{option} {value}")
    return " ".join(words)


def _read(path: Path) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """A file's question, base and variants; their keys are options."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    question, base, variants = content.get("question"), content.get("base", {}), content.get("variants")
    problems = []
    if unknown := [f"{key}{near(key, _KEYS)}" for key in content if key not in _KEYS]:
        problems.append(f"no such key: {', '.join(unknown)}, want {', '.join(_KEYS)}")
    if not isinstance(question, str) or not question.strip():
        problems.append(f"question: got {question!r}, want a text")
    tables: dict[str, Any] = {"base": base}
    if not isinstance(variants, dict) or len(variants) < 2:
        problems.append(f"variants: got {variants!r}, want two tables at least, such as [variants.wide]")
    else:
        tables |= {f"variant {name!r}": changes for name, changes in variants.items()}
    for where, table in tables.items():
        if not isinstance(table, dict):
            problems.append(f"{where}: got {table!r}, want a table of options")
            continue
        for key in table:
            if key not in TrainConfig.model_fields:
                problems.append(f"{where}: no such option: {key}{near(key, TrainConfig.model_fields)}")
            elif key == "seed" or (key in _SHARED and where != "base"):
                problems.append(f"{where}: {key} must be the same for all variants: give {flag(TrainConfig, key)}")
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    assert isinstance(question, str), "checked above"
    assert isinstance(variants, dict), "checked above"
    return question, base, variants


_KEYS = ("question", "base", "variants")


def _told(path: Path, text: str, variants: list[str], count: int) -> str:
    """What is wrong with some variants; where all share it, with what they share."""
    if len(variants) == count or text.startswith(f"{path}: variant"):
        return text
    return f"{path}: variant {', '.join(map(repr, variants))}: {text}"


def _check(path: Path, variants: list[Variant]) -> None:
    """What no variant is at fault for alone."""
    if not variants[0].config.validation_images:
        raise ValueError(
            "variants are compared on validation images, and --validation-images is 0; want some, say 5000"
        )
    seen: dict[TrainConfig, str] = {}
    for variant in variants:
        other = seen.setdefault(variant.config, variant.name)
        if other != variant.name:
            raise ValueError(f"{path}: variants {other!r} and {variant.name!r} are the same training")
