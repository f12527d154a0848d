"""A search for good options: trials of one study in an SQLite file, by any number of processes. No printing.

A trial is a training whose options Optuna picks by what earlier ones gave. It is judged by its accuracy on the
validation images: the test set is not known here. A trial that falls behind the others is ended early.

Every trial trains with the same seed, so that all are measured on the same images and the best can be repeated. What is
picked depends on that seed, the trial's number and the trials before it: not on the process, nor on how many were
asked for at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch

from serving.errors import ParityserveError
from serving.options import flag
from trainer import runs
from trainer.config import TrainConfig
from trainer.data import Split
from trainer.devices import select_device
from trainer.space import Choices, Plan, Range, Value
from trainer.train import EpochMetrics

try:
    import numpy as np
    import optuna
    from filelock import FileLock, Timeout
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError
except ImportError as error:
    raise ParityserveError(f"the search needs Optuna ({error}): pip install 'parityserve[search]'") from error

State: TypeAlias = Literal["finished", "pruned", "refused", "failed"]

WAIT_S = 60.0  # for another process that writes to the file
UNPRUNED = 5  # trials that must have finished before any is pruned
IMPORTANCE_TRIALS = 10  # fewer say nothing about what matters

_STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.OptunaError, Timeout)

_ABOUT = "parityserve"  # the study's attribute that says what it is of
_REASON = "reason"  # the trial's that says why it has no accuracy


class SearchError(ParityserveError):
    """A file that holds no study, or one that is not of the search that was asked for."""


@dataclass(frozen=True)
class Outcome:
    """A trial that has ended."""

    number: int  # from 0
    state: State  # refused: the options contradict each other; failed: it was stopped, or found no memory
    accuracy: float | None  # on the validation images, of the weights to keep; of a pruned trial, its last epoch's
    epochs: int
    seconds: float
    options: dict[str, Value]  # those that are varied
    reason: str  # why it was refused or failed


@dataclass(frozen=True)
class Watcher:
    """Who is told how the trials of this process go; every call is optional."""

    on_device: Callable[[torch.device, str], None] = lambda *_: None
    """The device of all trials, and why."""
    on_start: Callable[[int, int], None] = lambda *_: None
    """A trial's number and the images of all its epochs together."""
    on_step: Callable[[int], None] = lambda _: None
    on_epoch: Callable[[EpochMetrics], None] = lambda _: None
    on_end: Callable[[Outcome], None] = lambda _: None


class Search:
    """The study in a file; call `close` when done with it."""

    def __init__(self, plan: Plan, path: Path) -> None:
        """Open the study, or begin one where the file is missing.

        Raises:
            SearchError: the file is no study, or one of other options; the text has what differs.
        """
        self.plan, self.path = plan, path
        path.parent.mkdir(parents=True, exist_ok=True)
        # What Optuna has to say goes where all else goes; what it does is told by us.
        optuna.logging.disable_default_handler()
        optuna.logging.enable_propagation()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Held while a study or a trial begins. SQLite alone would let two processes begin the same one.
        self._lock = FileLock(self._lock_path(""), timeout=WAIT_S)
        try:
            with self._lock:
                self._storage = optuna.storages.RDBStorage(
                    f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": WAIT_S}}
                )
                self._study = self._open()
        except (*_STORAGE_ERRORS, RuntimeError) as error:  # the last, where a newer Optuna has made the file
            raise SearchError(f"{path} is not a study that can be read: {error}") from error

    def close(self) -> None:
        """Let go of the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    @property
    def outcomes(self) -> list[Outcome]:
        """The trials that have ended, of all processes."""
        trials = self._study.get_trials(deepcopy=False)
        return [self._outcome(trial) for trial in trials if trial.state.is_finished()]

    @property
    def ranking(self) -> list[Outcome]:
        """The trials that were trained to the end, the best first."""
        finished = [outcome for outcome in self.outcomes if outcome.state == "finished"]
        return sorted(finished, key=lambda outcome: (-(outcome.accuracy or 0), outcome.number))

    def importance(self) -> tuple[dict[str, float], int]:
        """How much each option decides whether a trial is among the best, in parts of 1, and how many these are.

        Raises:
            ValueError: this cannot be told; the text says why.
        """
        ranking = self.ranking
        if len(self.plan.space) < 2:
            raise ValueError("only one option is varied")
        if len(ranking) < IMPORTANCE_TRIALS:
            raise ValueError(f"that takes {IMPORTANCE_TRIALS} trials trained to the end, and there are {len(ranking)}")
        best = max(5, len(ranking) // 10)  # enough of them for PED-ANOVA, and no more than the best tenth
        if ranking[best - 1].accuracy == ranking[-1].accuracy:
            raise ValueError("the trials are too much alike")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best / len(ranking))
        return optuna.importance.get_param_importances(self._study, evaluator=evaluator), best

    def run(self, train: Split, trials: int, watcher: Watcher | None = None) -> None:
        """Add trials to the study, one after the other.

        Args:
            train: the whole training set, on the CPU; it is moved to the device once.
            trials: how many.
            watcher: who is told.

        Raises:
            DeviceError: the device cannot be used.
            SearchError: the study cannot be written.
            ValueError: there are fewer images than asked for.
        """
        watcher = watcher or Watcher()
        runs.divide(train, self.plan.example)
        device, why = select_device(self.plan.example.device)
        train = runs.place(train, device, self.plan.example.stream)
        watcher.on_device(device, why)
        try:
            for _ in range(trials):
                self._add_trial(train, watcher)
        except _STORAGE_ERRORS as error:
            raise SearchError(f"{self.path} cannot be written: {error}") from error

    def _add_trial(self, train: Split, watcher: Watcher) -> None:
        with self._lock:
            self._bury()
            self._study.sampler = self._sampler(len(self._study.get_trials(deepcopy=False)))
            trial = self._study.ask()
            # Held as long as the trial is trained. It is let go of, too, when this process is killed.
            alive = FileLock(self._lock_path(f"-{trial.number}"))
            alive.acquire()
            try:
                drawn = self.plan.draw(lambda name, values: _suggest(trial, name, values))
            except BaseException:
                self._study.tell(trial, state=TrialState.FAIL)
                raise
        state, accuracy, reason = TrialState.FAIL, None, "stopped"
        try:
            state, accuracy, reason = self._train(trial, drawn, train, watcher)
        finally:
            if reason:
                trial.set_user_attr(_REASON, reason)
            self._study.tell(trial, accuracy, state=state)
            Path(alive.lock_file).unlink(missing_ok=True)
            alive.release()
        watcher.on_end(self._outcome(self._study.get_trials(deepcopy=False)[trial.number]))

    def _train(
        self, trial: optuna.Trial, drawn: dict[str, Value], train: Split, watcher: Watcher
    ) -> tuple[TrialState, float | None, str]:
        """How a trial ends, its accuracy if it does so by itself, and else why it has none."""
        try:
            config = self.plan.config(drawn)
            prepared = runs.prepare(config, train, watcher.on_step)
        except ValueError as error:  # without an accuracy it counts as worse than any: so the sampler learns
            return TrialState.PRUNED, None, str(error)
        training = prepared.training
        watcher.on_start(trial.number, config.epochs * prepared.training.epoch_images)
        try:
            for metrics in training.epochs():
                assert metrics.validation_accuracy is not None, "a plan has validation images"
                trial.report(metrics.validation_accuracy, metrics.epoch)
                watcher.on_epoch(metrics)
                if not training.finished and trial.should_prune():
                    return TrialState.PRUNED, None, ""
        except torch.OutOfMemoryError as error:
            return TrialState.FAIL, None, str(error).splitlines()[0]
        kept = training.best_epoch if config.keep == "best" else len(training.history)
        return TrialState.COMPLETE, training.history[kept - 1].validation_accuracy, ""

    def _open(self) -> optuna.Study:
        names = optuna.get_all_study_names(self._storage)
        if len(names) > 1:
            raise SearchError(f"{self.path} holds {len(names)} studies, and was not made by this command")
        pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED)
        if not names:
            study = optuna.create_study(
                storage=self._storage, study_name=self.path.stem, direction="maximize", pruner=pruner
            )
        else:
            study = optuna.load_study(storage=self._storage, study_name=names[0], pruner=pruner)
        about = {"space": {name: str(values) for name, values in self.plan.space.items()}, "shared": self.plan.shared}
        about = json.loads(json.dumps(about))
        there = study.user_attrs.get(_ABOUT)
        if there is None:
            if study.get_trials(deepcopy=False):
                raise SearchError(f"{self.path} was not made by this command")
            study.set_user_attr(_ABOUT, about)
        elif differ := _differences(about, there):
            raise SearchError(f"{self.path} is of another search: {'; '.join(differ)}; choose another --study")
        return study

    def _bury(self) -> None:
        """End the trials whose process has died; the lock is held."""
        for trial in self._study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            alive = FileLock(self._lock_path(f"-{trial.number}"), timeout=0)
            try:
                with alive:
                    # It may have ended by itself since it was listed.
                    self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                    Path(alive.lock_file).unlink(missing_ok=True)
            except Timeout:
                pass  # it is being trained

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = np.random.SeedSequence([self.plan.example.seed, number]).generate_state(1)[0]
        return optuna.samplers.TPESampler(seed=int(seed))

    def _lock_path(self, suffix: str) -> Path:
        return self.path.with_name(f".{self.path.name}{suffix}.lock")

    def _outcome(self, trial: FrozenTrial) -> Outcome:
        reason = trial.user_attrs.get(_REASON, "")
        state: State = "failed"
        if trial.state == TrialState.COMPLETE:
            state = "finished"
        elif trial.state == TrialState.PRUNED:
            state = "refused" if reason else "pruned"
        elif not reason:
            reason = "its process was killed"
        return Outcome(
            number=trial.number,
            state=state,
            accuracy=trial.value if state != "failed" else None,
            epochs=trial.last_step or 0,
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
            options={name: _tidy(self.plan.space[name], value) for name, value in trial.params.items()},
            reason=reason,
        )


def _suggest(trial: optuna.Trial, name: str, values: Choices | Range) -> Value:
    """Have Optuna pick."""
    if isinstance(values, Choices):
        return cast(Value, trial.suggest_categorical(name, values.values))
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, step=int(values.step or 1), log=values.log)
    return values.tidy(trial.suggest_float(name, values.low, values.high, step=values.step, log=values.log))


def _tidy(values: Choices | Range, value: Any) -> Value:
    return values.tidy(value) if isinstance(values, Range) else value


def _differences(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """What two searches do not have in common, for people."""
    spaces = here["space"], there["space"]
    differ = [
        f"{name} varies over {spaces[0].get(name, 'nothing')} here and {spaces[1].get(name, 'nothing')} there"
        for name in sorted({*spaces[0], *spaces[1]})
        if spaces[0].get(name) != spaces[1].get(name)
    ]
    if differ:
        return differ  # the rest follows from it
    return [
        f"{flag(TrainConfig, name) if name in TrainConfig.model_fields else name} is {value} here and "
        f"{there['shared'].get(name)} there"
        for name, value in here["shared"].items()
        if value != there["shared"].get(name)
    ]
