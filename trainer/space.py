"""What a search varies: a TOML file with choices or a range for each option. `trainer/spaces/` has one to begin with.

batch_size = [64, 128]                                    # choices
learning_rate = { low = 1e-3, high = 1e-2, log = true }   # a range; it may have a step instead
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from serving.options import build, flag, kind_of, near, read_toml
from trainer import sources
from trainer.config import BELONGS, TrainConfig

SPACES = Path(__file__).with_name("spaces")

Value: TypeAlias = bool | int | float | str  # as Optuna keeps it: channels and hidden are texts, such as 16,32
Pick: TypeAlias = "Callable[[str, Choices | Range], Value]"

# The same for all trials: the first three say on which images they are compared.
_SHARED = ("dataset", "validation_images", "seed", "device")
_RANGE_KEYS = ("low", "high", "log", "step")
_TRIES = 500  # draws in which each value must have been accepted once


@dataclass(frozen=True)
class Choices:
    """Some values of an option."""

    values: tuple[Value, ...]

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check."""
        return self.values

    def draw(self, generator: random.Random) -> Value:
        """One of them."""
        return generator.choice(self.values)

    def __str__(self) -> str:
        return " | ".join(map(told, self.values))


@dataclass(frozen=True)
class Range:
    """All values of an option from `low` to `high`, both included: whole numbers where these are."""

    low: int | float
    high: int | float
    log: bool = False  # as many below their geometric mean as above
    step: int | float | None = None  # None: any number, or any whole number

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values to check."""
        return self.low, self.high

    def draw(self, generator: random.Random) -> Value:
        """A number in it."""
        if self.step is not None:
            return self.tidy(self.low + self.step * generator.randint(0, round((self.high - self.low) / self.step)))
        whole = isinstance(self.low, int)
        return generator.randint(int(self.low), int(self.high)) if whole else generator.uniform(self.low, self.high)

    def tidy(self, number: int | float) -> int | float:
        """A number of the range as people write it: without a step, four digits say enough."""
        if isinstance(self.low, int):
            return int(number)
        return min(max(float(f"{number:{'.12g' if self.step else '.4g'}}"), self.low), self.high)

    def __str__(self) -> str:
        return f"{self.low} to {self.high}{', log' * self.log}" + (f", step {self.step}" if self.step else "")


@dataclass(frozen=True)
class Plan:
    """What the trials of a search share, and what they try."""

    space: dict[str, Choices | Range]  # options that others depend on come first
    given: dict[str, Any]  # options that all trials share
    names: dict[str, str]  # what to call each option in an error
    example: TrainConfig  # of a trial that is accepted; always the same one

    def draw(self, pick: Pick) -> dict[str, Value]:
        """Have `pick` choose for each option that says something beside those chosen before."""
        drawn: dict[str, Value] = {}
        for name, values in self.space.items():
            if _applies(name, {**self.given, **drawn}):
                drawn[name] = pick(name, values)
        return drawn

    def config(self, drawn: Mapping[str, Value]) -> TrainConfig:
        """The configuration of a trial.

        Raises:
            ValueError: the options contradict each other.
        """
        return build(TrainConfig, {**self.given, **drawn}, self.names)

    @property
    def shared(self) -> dict[str, Any]:
        """All options that are the same in every trial, as JSON takes them, but where it runs."""
        left_out = {*self.space, "device", "stream"}
        return {name: value for name, value in self.example.model_dump(mode="json").items() if name not in left_out}


def spaces() -> list[str]:
    """The names of the spaces that come with the package."""
    return sources.names(SPACES)


def plan(space: str, options: Mapping[str, Any], recipe: str | None = None, file: Path | None = None) -> Plan:
    """Read a space, and make sure that its trials can be trained and compared.

    Args:
        space: as for `sources.file_of`; it takes precedence over `file` and `recipe`.
        options: those that were given for all trials.
        recipe: as for `sources.resolve`.
        file: as for `sources.resolve`.

    Raises:
        ValueError: the space is not one, or not to be had with the options; the text names the file and the option.
        OSError: a file cannot be read.
    """
    path = sources.file_of("--space", space, SPACES)
    found = _read(path)
    if twice := [flag(TrainConfig, name) for name in options if name in found]:
        raise ValueError(
            f"{', '.join(twice)} cannot be fixed: {path} varies it; leave it out here, or in a space of your own"
        )
    given, names = sources.gather(options, recipe, file)
    given = {name: value for name, value in given.items() if name not in found}
    names |= {name: f"{path}: {name}" for name in found}
    if given.get("validation_images") == 0:
        raise ValueError(
            f"{names['validation_images']}: trials are compared on validation images, and there are 0; "
            "--validation-images 5000 keeps some"
        )
    draft = Plan(dict(sorted(found.items(), key=lambda item: item[0] in BELONGS)), given, names, TrainConfig())
    generator = random.Random(0)
    first: TrainConfig | None = None
    for name, values in draft.space.items():
        for value in values.ends:
            accepted = _accepted(draft, path, name, value, generator)
            first = first or accepted
    assert first is not None, "a space is not empty"
    return Plan(draft.space, given, names, first)


def _applies(name: str, chosen: Mapping[str, Any]) -> bool:
    """Whether an option says something where others have been chosen, which have their defaults where they are not."""
    if name not in BELONGS:
        return True
    chooser, choices = BELONGS[name]
    return chosen.get(chooser, TrainConfig.model_fields[chooser].default) in choices


def _accepted(plan: Plan, path: Path, name: str, value: Value, generator: random.Random) -> TrainConfig:
    """The configuration of some trial that has `value` for option `name`."""
    problem = ""
    for _ in range(_TRIES):
        drawn = plan.draw(lambda option, values: value if option == name else values.draw(generator))
        if name not in drawn:
            chooser, choices = BELONGS[name]
            problem = problem or f"it is for {flag(TrainConfig, chooser)} {' or '.join(choices)}"
            continue
        try:
            return plan.config(drawn)
        except ValueError as error:
            problem = str(error)
    raise ValueError(f"{path}: {name}: no trial could have {told(value)}: {problem}")


def _read(path: Path) -> dict[str, Choices | Range]:
    content = read_toml(TrainConfig, path)
    if not content:
        raise ValueError(f"{path}: varies nothing; want choices or a range for an option, as in dropout = [0.0, 0.5]")
    found: dict[str, Choices | Range] = {}
    problems = []
    for name, value in content.items():
        try:
            found[name] = _values(name, value)
        except ValueError as error:
            problems.append(f"{path}: {name}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _values(name: str, value: Any) -> Choices | Range:
    if name in _SHARED:
        raise ValueError(f"must be the same for all trials: leave it out, and give {flag(TrainConfig, name)}")
    if isinstance(value, dict):
        return _range(name, value)
    if not isinstance(value, list):
        raise ValueError(f"got {value!r}, want a list of choices, or {{ low = ..., high = ... }} with log or step")
    choices = tuple(_value(name, each) for each in value)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f"got {value!r}, want two choices at least, all different")
    return Choices(choices)


def _range(name: str, table: dict[str, Any]) -> Range:
    kind = kind_of(TrainConfig, name)
    if kind not in (int, float):
        raise ValueError("has no range; want a list of choices")
    if unknown := [f"{key}{near(key, _RANGE_KEYS)}" for key in table if key not in _RANGE_KEYS]:
        raise ValueError(f"no such key of a range: {', '.join(unknown)}; want low and high, and log or step")
    low, high = _number(kind, table, "low"), _number(kind, table, "high")
    step = _number(kind, table, "step") if "step" in table else None
    log = table.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"log: got {log!r}, want true or false")
    if low >= high:
        raise ValueError(f"low {low} is not below high {high}")
    if log and (low <= 0 or step is not None):
        raise ValueError("log = true needs a low above 0, and no step")
    if step is not None and (step <= 0 or (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step))):
        raise ValueError(f"step {step} does not lead from {low} to {high}")
    for end in (low, high):
        _value(name, end)
    return Range(low, high, log, step)


def _number(kind: type[int] | type[float], table: Mapping[str, Any], key: str) -> int | float:
    number = table.get(key)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"{key}: got {number!r}, want a number")
    if kind is int and number != int(number):
        raise ValueError(f"{key}: got {number!r}, want a whole number")
    return kind(number)


def _value(name: str, value: Any) -> Value:
    """A value that the option takes by itself, as `Value` has it."""
    try:
        TrainConfig(**{name: value})
    except ValidationError as error:
        for problem in error.errors():
            if problem["loc"] and problem["loc"][0] == name:
                text = problem["msg"].removeprefix("Value error, ")
                raise ValueError(f"{text}, got {value!r}") from error
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    assert isinstance(value, bool | int | float | str), "no option takes anything else"
    return value


def told(value: Value) -> str:
    """A value as TOML has it, but for the quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)
