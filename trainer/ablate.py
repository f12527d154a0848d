"""Train every variant of a study with the same seeds, and compare them on the validation images; no printing.

Each finished training is written to a file at once, and one that is there is not repeated.
"""

from __future__ import annotations

import json
import math
import secrets
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from serving.options import flag
from trainer import runs
from trainer.config import TrainConfig
from trainer.data import Split
from trainer.models import count_parameters
from trainer.studies import Study
from trainer.train import evaluate

FORMAT = "parityserve-ablation/1"

# Student's t at 0.975 (both tails together hold 5 %) for 1 to 30 degrees of freedom; it falls to 1.96 from there.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


@dataclass(frozen=True)
class Result:
    """One finished training."""

    variant: str
    seed: int
    options: dict[str, Any]  # all of them, as `TrainConfig` dumps them
    device: str
    parameters: int
    validation_accuracy: float  # from 0 to 1, as the others
    train_accuracy: float  # of as many images that were trained on, as they are, by the finished network
    test_accuracy: float | None  # None where it was not asked for
    epochs: int  # fewer than asked for with early stopping
    seconds: float  # of training, validation not counted
    images_per_s: float


@dataclass(frozen=True)
class Spread:
    """A figure over several seeds."""

    mean: float
    deviation: float | None  # of the sample (n - 1); None for a single seed


@dataclass(frozen=True)
class Difference:
    """How far a variant is from the first, seed by seed, so that what a seed does to both does not count."""

    mean: float
    standard_error: float | None  # of the mean; None for a single seed
    clear: bool  # chance alone gives as much in less than 5 of 100 cases (Student's t, two-sided)


@dataclass(frozen=True)
class Row:
    """What a study found out about one variant; accuracies from 0 to 1."""

    variant: str
    changes: dict[str, Any]
    parameters: int
    accuracies: tuple[float, ...]  # in validation, by seed
    validation: Spread
    train: Spread
    test: Spread | None
    difference: Difference | None  # in validation accuracy; None for the first variant
    seconds: Spread
    images_per_s: float  # mean


@dataclass(frozen=True)
class Watcher:
    """Who is told how a study goes; every call is optional."""

    on_start: Callable[[str, int, int, int], None] = lambda *_: None
    """The variant, the seed, its images in all epochs together, the trainings that are done."""
    on_step: Callable[[int], None] = lambda _: None
    on_result: Callable[[Result], None] = lambda _: None


def run(
    study: Study, seeds: Sequence[int], train: Split, test: Split | None, file: Path, watcher: Watcher | None = None
) -> list[Result]:
    """Train every variant with every seed, but for what `file` has already.

    All variants take their turn with one seed before the next: what disturbs a machine for a while disturbs them alike.

    Args:
        study: whose variants are trained.
        seeds: of all that is drawn at random, the division into training and validation images too.
        train: the whole training set, on the CPU.
        test: the test set, on the CPU; None to leave it alone. With it, a training in `file` without is repeated.
        file: JSON; written after every training, complete or not at all.
        watcher: who is told.

    Returns:
        The trainings by seed, and in the study's order; without what the file may have of a test set not given.

    Raises:
        ValueError: `file` is of something else or has trainings with other options, or a variant cannot be trained;
            nothing was trained.
        DeviceError: the device cannot be used.
    """
    watcher = watcher or Watcher()
    kept = read(file, study)
    devices = _try_all(study, train)
    orders = [(seed, variant) for seed in seeds for variant in study.variants]
    configs = {(variant.name, seed): variant.config.model_copy(update={"seed": seed}) for seed, variant in orders}
    for result in kept:
        if config := configs.get((result.variant, result.seed)):
            _check_same(result, config, devices[result.variant], file)
    done = {(result.variant, result.seed): result for result in kept}
    missing = [key for key in configs if key not in done or (test is not None and done[key].test_accuracy is None)]
    for key in missing:
        name, seed = key
        config = configs[key]
        images = config.epochs * (config.train_images or len(train) - config.validation_images)
        watcher.on_start(name, seed, images, len(configs) - len(missing) + missing.index(key))
        done[key] = _train(name, config, train, test, watcher)
        _write(file, study, list(done.values()))
        watcher.on_result(done[key])
    return [done[key] if test is not None else replace(done[key], test_accuracy=None) for key in configs]


def read(file: Path, study: Study) -> list[Result]:
    """The finished trainings in a file; none where there is no such file.

    Raises:
        ValueError: the file is of something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON: {error}; name another file with --json") from error
    what = {"format": FORMAT, "study": study.name, "dataset": study.dataset}
    for key, want in what.items():
        got = content.get(key) if isinstance(content, dict) else None
        if got != want:
            raise ValueError(f"{file}: its {key} is {got!r}, want {want!r}; name another file with --json")
    try:
        return [Result(**result) for result in content["results"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file}: incomplete: {error}; name another file with --json") from error


def compare(study: Study, results: Sequence[Result]) -> list[Row]:
    """What the trainings say about each variant, in the study's order.

    Args:
        study: what was trained.
        results: of every variant with the same seeds.
    """
    of = {variant.name: [result for result in results if result.variant == variant.name] for variant in study.variants}
    reference = [result.validation_accuracy for result in of[study.variants[0].name]]
    rows: list[Row] = []
    for variant in study.variants:
        found = of[variant.name]
        accuracies = [result.validation_accuracy for result in found]
        tested = [result.test_accuracy for result in found if result.test_accuracy is not None]
        rows.append(
            Row(
                variant=variant.name,
                changes=variant.changes,
                parameters=found[0].parameters,
                accuracies=tuple(accuracies),
                validation=spread(accuracies),
                train=spread([result.train_accuracy for result in found]),
                test=spread(tested) if len(tested) == len(found) else None,
                difference=difference(accuracies, reference) if rows else None,
                seconds=spread([result.seconds for result in found]),
                images_per_s=statistics.fmean(result.images_per_s for result in found),
            )
        )
    return rows


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """The mean of the differences of two figures of the same seeds, and how sure it is."""
    found = spread([value - other for value, other in zip(values, reference, strict=True)])
    if found.deviation is None:
        return Difference(found.mean, None, clear=False)
    error = found.deviation / math.sqrt(len(values))
    return Difference(found.mean, error, clear=abs(found.mean) > _T95[min(len(values) - 1, len(_T95)) - 1] * error)


def _try_all(study: Study, train: Split) -> dict[str, str]:
    """Get every variant ready to train, so that one that cannot be is known now; gives the devices by variant."""
    devices, problems = {}, []
    for variant in study.variants:
        try:
            devices[variant.name] = str(runs.prepare(variant.config, train).device)
        except ValueError as error:
            problems.append(f"variant {variant.name!r}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return devices


def _check_same(result: Result, config: TrainConfig, device: str, file: Path) -> None:
    here: Mapping[str, Any] = config.model_dump(mode="json")
    differ = [
        f"{flag(TrainConfig, name)} is {value} here and {result.options.get(name)} there"
        for name, value in here.items()
        if value != result.options.get(name)
    ]
    if result.device != device:
        differ.append(f"training is on {device} here and was on {result.device} there")
    if differ:
        raise ValueError(
            f"{file} has variant {result.variant!r} trained otherwise: {'; '.join(differ)}; "
            "name another file with --json, or remove that one"
        )


def _train(name: str, config: TrainConfig, train: Split, test: Split | None, watcher: Watcher) -> Result:
    prepared = runs.prepare(config, train, watcher.on_step)
    training, network, validation = prepared.training, prepared.network, prepared.validation
    assert validation is not None, "a study without validation images is refused"
    for _ in training.epochs():
        pass
    network.load_state_dict(training.result())
    seen = Split(prepared.fitting.images[: len(validation)], prepared.fitting.labels[: len(validation)])
    epochs = len(training.history)
    seconds = sum(metrics.seconds for metrics in training.history)
    return Result(
        variant=name,
        seed=config.seed,
        options=config.model_dump(mode="json"),
        device=str(prepared.device),
        parameters=count_parameters(network),
        validation_accuracy=evaluate(network, validation)[1],
        train_accuracy=evaluate(network, seen.to(prepared.device))[1],
        test_accuracy=None if test is None else evaluate(network, test.to(prepared.device))[1],
        epochs=epochs,
        seconds=seconds,
        images_per_s=epochs * prepared.training.epoch_images / seconds,
    )


def _write(file: Path, study: Study, results: Sequence[Result]) -> None:
    content = {
        "format": FORMAT,
        "study": study.name,
        "dataset": study.dataset,
        "question": study.question,
        "results": [asdict(result) for result in results],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
