"""Searches: spaces, studies that are shared, resumed, killed and refused, pruning, the recipe, the pictures."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from conftest import MODEL
from PIL import Image
from test_data import idx

from trainer import data, pictures, runs, search_plots, sources, space
from trainer.__main__ import main, parser
from trainer.config import TrainConfig
from trainer.data import DATASETS, TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS
from trainer.search import Outcome, Search, SearchError, Watcher
from trainer.train import Training

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("search_on_sample.py")
BASE = {
    "dataset": MODEL,
    "device": "cpu",
    "channels": "none",
    "hidden": [16],
    "epochs": 2,
    "train_images": 200,
    "validation_images": 100,
    "batch_size": 50,
}
SMALL = """
learning_rate = { low = 1e-3, high = 3e-2, log = true }
dropout = { low = 0.0, high = 0.4, step = 0.1 }
activation = ["relu", "tanh"]
"""


@pytest.fixture
def make(tmp_path):
    """Opens a study in tmp_path; closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(text=SMALL, name="study", **changes):
            file = tmp_path / "space.toml"
            file.write_text(text)
            options = {key: value for key, value in (BASE | changes).items() if value is not None}
            study = Search(space.plan(str(file), options), tmp_path / f"{name}.db")
            stack.callback(study.close)
            return study

        yield make


def timeless(outcomes):
    return [replace(outcome, seconds=0.0) for outcome in outcomes]


# --- the space


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "varies nothing; want choices or a range for an option"),
        ("dropout = [", "not TOML"),
        ("drop_out = [0.1, 0.2]", r"no such setting: drop_out \(did you mean dropout\?\)"),
        ("dropout = 0.3", r"dropout: got 0.3, want a list of choices, or \{ low = ..., high = ... \} with log or step"),
        ("dropout = []", r"dropout: got \[\], want two choices at least, all different"),
        ("dropout = [0.1]", r"dropout: got \[0.1\], want two choices at least"),
        ("dropout = [0.1, 0.1]", "want two choices at least, all different"),
        ("dropout = [0.1, 1.5]", "dropout: Input should be less than 1, got 1.5"),
        ('optimiser = ["adam", "lion"]', "optimiser: Input should be 'sgd', 'rmsprop', 'adam' or 'adamw', got 'lion'"),
        ("channels = [[8], [0]]", r"channels: want sizes of at least 1, as in 16,32, or none, got \[0\]"),
        ('activation = { low = "relu", high = "tanh" }', "activation: has no range; want a list of choices"),
        ("kernel_size = { low = 1, high = 7 }", "kernel_size: has no range"),
        ("dropout = { low = 0, high = 1 }", "dropout: Input should be less than 1, got 1.0"),
        ("dropout = { low = 0 }", "dropout: high: got None, want a number"),
        ("dropout = { low = 0, high = inf }", "dropout: high: got inf, want a number"),
        ("dropout = { low = false, high = 0.5 }", "dropout: low: got False, want a number"),
        ("dropout = { low = 0.5, high = 0.1 }", "dropout: low 0.5 is not below high 0.1"),
        ("dropout = { low = 0, high = 0.5, steps = 0.1 }", r"no such key of a range: steps \(did you mean step\?\)"),
        ("dropout = { low = 0, high = 0.5, step = 0.2 }", "step 0.2 does not lead from 0.0 to 0.5"),
        ("dropout = { low = 0, high = 0.5, step = -0.1 }", "step -0.1 does not lead from 0.0 to 0.5"),
        ("dropout = { low = 0, high = 0.5, log = true }", "log = true needs a low above 0, and no step"),
        ("dropout = { low = 0.1, high = 0.5, step = 0.1, log = true }", "log = true needs a low above 0, and no step"),
        ("dropout = { low = 0.1, high = 0.5, log = 1 }", "log: got 1, want true or false"),
        ("batch_size = { low = 1.5, high = 8 }", "batch_size: low: got 1.5, want a whole number"),
        ("seed = [1, 2]", "seed: must be the same for all trials: leave it out, and give --seed"),
        ('dataset = ["mnist", "fashion-mnist"]', "dataset: must be the same for all trials"),
        ("dropout = 1\nema = 2", r"dropout: got 1, want a list(.|\n)*ema: got 2, want a list"),
        (
            "shift = [0, 1]\nmomentum = [0.0, 0.5]",
            "momentum: no trial could have 0.0: it is for --optimiser sgd or rmsp",
        ),
        (
            'activation = ["relu", "tanh"]\nkernel_size = [3, 5]',
            "kernel_size: no trial could have 5: --kernel-size has",
        ),
    ],
)
def test_a_wrong_space_says_what_is_wrong(tmp_path, text, problem):
    file = tmp_path / "space.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"{file}: (.|\n)*{problem}"):
        space.plan(str(file), BASE | {"dropout": 0.0} if "dropout" not in text else BASE)


def test_what_a_space_cannot_be_had_with(tmp_path):
    with pytest.raises(ValueError, match=r"--space: got 'wide', want one of default, or the path of a \.toml file"):
        space.plan("wide", {})
    with pytest.raises(FileNotFoundError):
        space.plan(str(tmp_path / "none.toml"), {})
    with pytest.raises(ValueError, match=r"--dropout, --activation cannot be fixed: .*default\.toml varies it"):
        space.plan("default", {"dropout": 0.1, "activation": "relu"})
    with pytest.raises(
        ValueError, match="--validation-images: trials are compared on validation images, and there are"
    ):
        space.plan("default", {"validation_images": 0})
    with pytest.raises(ValueError, match="recipe course-mnist: validation_images: trials are compared on"):
        space.plan("default", {}, recipe="course-mnist")
    with pytest.raises(ValueError, match="--epochs: Input should be greater than or equal to 1, got 0"):
        space.plan("default", {"epochs": 0})
    with pytest.raises(ValueError, match="--flip is for --dataset fashion-mnist, which is mnist here"):
        space.plan("default", {"flip": True})


def test_a_space_varies_a_recipe(tmp_path):
    plan = space.plan("default", {"validation_images": 1000}, recipe="course-mnist")
    config = plan.config({"learning_rate": 0.015})
    assert (config.learning_rate, config.optimiser, config.validation_images) == (0.015, "adam", 1000)
    assert (
        space.plan("default", {"validation_images": 5000}, recipe="best-fashion").config({}).weight_decay == 0.01
    )  # not the recipe's 0.02


def test_every_space_of_the_package_goes_with_every_network():
    for name in space.spaces():
        for network in ("cnn", "convnet", "mlp"):
            assert space.plan(name, {"network": network}).example.network == network


def test_the_docs_space_and_commands_are_accepted(tmp_path):
    section = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## Search\n")[1].split("\n## ")[0]
    (text,) = re.findall(r"^```toml\n(.*?)^```", section, re.M | re.S)
    (tmp_path / "mine.toml").write_text(text)
    plan = space.plan(str(tmp_path / "mine.toml"), {"dataset": "mnist"})
    assert plan.space["momentum"] == space.Range(0.8, 0.98)
    (commands,) = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
    for line in commands.splitlines():
        parser().parse_args(shlex.split(line.removeprefix("python -m trainer ")))


def test_an_option_is_varied_only_where_it_says_something(make, sample):
    study = make('momentum = [0.5, 0.9]\nbeta2 = { low = 0.9, high = 0.999 }\noptimiser = ["sgd", "adam"]', epochs=1)
    study.run(sample[0], 6)
    options = [outcome.options for outcome in study.outcomes]
    assert {tuple(each) for each in options} == {("optimiser", "momentum"), ("optimiser", "beta2")}
    assert all(("momentum" in each) == (each["optimiser"] == "sgd") for each in options)
    assert {outcome.state for outcome in study.outcomes} <= {"finished", "pruned"}


def test_values_are_of_the_range_and_short(make, sample):
    study = make(
        "learning_rate = { low = 1e-3, high = 3e-2, log = true }\ndropout = { low = 0.0, high = 0.4, step = 0.1 }\n"
        "batch_size = { low = 20, high = 60, step = 20 }\nhidden = [[8], [8, 8], []]\nepochs = { low = 1, high = 2 }\n"
        'activation = ["relu", "tanh"]',
        train_images=60,
        **{"hidden": None, "epochs": None, "batch_size": None},  # varied
    )
    study.run(sample[0], 12)
    for outcome in study.outcomes:
        options = outcome.options
        assert 1e-3 <= options["learning_rate"] <= 3e-2
        assert options["learning_rate"] == float(f"{options['learning_rate']:.4g}")
        assert options["dropout"] in (0.0, 0.1, 0.2, 0.3, 0.4)
        assert options["batch_size"] in (20, 40, 60)
        assert options["hidden"] in ("8", "8,8", "none")
        assert options["epochs"] in (1, 2)
        assert type(options["epochs"]) is int
    assert {outcome.options["hidden"] for outcome in study.outcomes} == {"8", "8,8", "none"}
    # Without any layer, activation and dropout have nothing to act on: this is known when such a trial begins.
    for outcome in study.outcomes:
        options = outcome.options
        refused = options["hidden"] == "none" and (options["activation"] == "tanh" or options["dropout"] > 0)
        assert (outcome.state == "refused") == refused
        assert (outcome.accuracy is None) == refused
        assert ("has nothing to act on where --channels and --hidden are none" in outcome.reason) == refused
    assert {outcome.state for outcome in study.outcomes} >= {"finished", "refused"}


# --- the study


def test_a_search_goes_on_as_if_it_had_not_ended(make, sample, tmp_path):
    """Also through another device option, and past the random trials that Optuna begins with."""
    whole = make(name="whole", epochs=1)
    whole.run(sample[0], 14)
    parts = make(name="parts", epochs=1)
    parts.run(sample[0], 3)
    parts.close()
    parts = make(name="parts", epochs=1, device="auto" if not torch.cuda.is_available() else "cpu", stream=True)
    parts.run(sample[0], 11)
    assert len(parts.outcomes) == 14
    assert timeless(parts.outcomes) == timeless(whole.outcomes)
    other = make(name="other", epochs=1, seed=1)
    other.run(sample[0], 3)
    assert [each.options for each in other.outcomes] != [each.options for each in whole.outcomes[:3]]
    assert len({json.dumps(each.options) for each in whole.outcomes}) == 14


@pytest.mark.parametrize(
    ("text", "changes", "problem"),
    [
        (SMALL.replace("3e-2", "1e-1"), {}, "learning_rate varies over 0.001 to 0.1, log here and 0.001 to 0.03, log"),
        (SMALL + "shift = [0, 1]", {}, r"shift varies over 0 \| 1 here and nothing there; choose another --study"),
        (
            SMALL,
            {"dataset": "mnist", "epochs": 1},
            "--dataset is mnist here and fashion-mnist there; --epochs is 1 here",
        ),
        (SMALL, {"seed": 3}, "--seed is 3 here and 0 there; choose another --study"),
        (SMALL, {"hidden": [8]}, r"--hidden is \[8\] here and \[16\] there"),
    ],
)
def test_another_search_is_refused_by_name(make, text, changes, problem):
    make()
    with pytest.raises(SearchError, match=rf"study\.db is of another search: {problem}"):
        make(text, **changes)


def test_other_files_are_refused(make, tmp_path):
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 100)
    with pytest.raises(SearchError, match=r"text\.db is not a study that can be read: .*not a database"):
        make(name="text")
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(SearchError, match=r"folder\.db is not a study that can be read"):
        make(name="folder")
    foreign = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'foreign.db'}")
    optuna.create_study(storage=foreign, study_name="mine").ask()
    with pytest.raises(SearchError, match=r"foreign\.db was not made by this command"):
        make(name="foreign")
    optuna.create_study(storage=foreign, study_name="another")
    foreign.engine.dispose()
    with pytest.raises(SearchError, match=r"foreign\.db holds 2 studies, and was not made by this command"):
        make(name="foreign")


def test_a_study_may_be_renamed(make, sample, tmp_path):
    study = make(epochs=1)
    study.run(sample[0], 1)
    study.close()
    (tmp_path / "study.db").rename(tmp_path / "kept.db")
    assert len(make(name="kept", epochs=1).outcomes) == 1


def test_trials_that_fall_behind_are_pruned(make, sample):
    """A rate at which nothing is learned, in one of four trials."""
    study = make("learning_rate = [0.01, 0.02, 0.03, 1e-7]", seed=2)
    epochs = []
    study.run(sample[0], 12, Watcher(on_epoch=epochs.append))
    outcomes = study.outcomes
    assert [outcome.state for outcome in outcomes[:5]] == ["finished"] * 5  # there is nothing to compare these with
    pruned = [outcome for outcome in outcomes if outcome.state == "pruned"]
    assert {outcome.options["learning_rate"] for outcome in pruned} >= {1e-7}
    finished = [outcome for outcome in outcomes if outcome.state == "finished"]
    assert all(outcome.options["learning_rate"] != 1e-7 for outcome in finished[5:])
    assert all((outcome.epochs, outcome.reason) == (1, "") for outcome in pruned)
    assert {outcome.epochs for outcome in finished} == {2}
    assert len(epochs) == 2 * len(finished) + len(pruned)
    assert study.ranking == sorted(finished, key=lambda outcome: (-outcome.accuracy, outcome.number))


def test_no_memory_for_one_trial_ends_that_one_alone(make, sample, monkeypatch):
    study, step, failing = make(epochs=1), Training._step, [True]

    def short_of_memory(*arguments):
        if failing:
            failing.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        step(*arguments)

    monkeypatch.setattr(Training, "_step", short_of_memory)
    study.run(sample[0], 2)
    assert [(each.state, each.reason) for each in study.outcomes] == [
        ("failed", "CUDA out of memory. Tried to allocate 2 GiB"),
        ("finished", ""),
    ]


def test_too_few_images_are_told_before_any_trial(make, sample):
    for changes, problem in (
        ({"train_images": 501}, "--train-images: got 501, want at most 500"),
        ({"validation_images": 600}, "validation images: got 600, want 1 to 599"),
    ):
        study = make(name=problem[:10].strip("- "), **changes)
        with pytest.raises(ValueError, match=problem):
            study.run(sample[0], 1)
        assert study.outcomes == []


# --- several processes


@contextlib.contextmanager
def searching(tmp_path, trials):
    """A process that begins to search."""
    order = {"space": str(tmp_path / "space.toml"), "options": BASE, "study": str(tmp_path / "study.db")}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(order | {"trials": trials})],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_three_processes_share_a_study_and_one_is_killed(make, sample, tmp_path):
    (tmp_path / "space.toml").write_text(SMALL)
    with searching(tmp_path, 3) as one, searching(tmp_path, 2) as two:
        # Both have come upon a missing file at about the same time, and are now in their first trials.
        assert sorted(process.stdout.readline() for process in (one, two)) == ["0\n", "1\n"]
        study = make()
        assert study.outcomes == []
        study.run(sample[0], 1)  # beside them: they must not be taken for dead
        assert [(outcome.number, outcome.state) for outcome in study.outcomes] == [(2, "finished")]
        two.kill()
        two.wait()
        one.communicate("go on\n", timeout=120)
        assert one.returncode == 0
    outcomes = study.outcomes
    assert [outcome.number for outcome in outcomes] == [0, 1, 2, 3, 4]
    (dead,) = [outcome for outcome in outcomes if outcome.state == "failed"]
    assert (dead.number in (0, 1), dead.accuracy, dead.reason) == (True, None, "its process was killed")
    assert {outcome.state for outcome in outcomes} == {"finished", "failed"}
    assert len({json.dumps(outcome.options) for outcome in outcomes}) == 5
    study.run(sample[0], 1)
    assert len(study.outcomes) == 6
    assert [path.name for path in tmp_path.glob(".*")] == [".study.db.lock"]


def test_a_study_that_another_process_holds_is_waited_for(make, sample, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.search.WAIT_S", 0.1)
    holder = sqlite3.connect(tmp_path / "study.db")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(SearchError, match=r"study\.db is not a study that can be read: .*database is locked"):
        make()
    holder.rollback()
    study = make()
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(SearchError, match=r"study\.db cannot be written: "):
        study.run(sample[0], 1)
    holder.close()
    study.run(sample[0], 1)
    assert [outcome.state for outcome in study.outcomes] == ["finished"]


# --- what comes of it


@pytest.mark.parametrize("keep", ["last", "best"])
def test_the_recipe_repeats_the_best_trial(make, sample, tmp_path, keep):
    text = SMALL + 'hidden = [[16], [16, 8]]\nschedule = ["constant", "onecycle"]\n'
    study = make(text, hidden=None, epochs=4, keep=keep)
    study.run(sample[0], 6)
    best = study.ranking[0]
    config = study.plan.config(best.options)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(sources.as_toml(config, ["one", "two"]))
    assert recipe.read_text().startswith("# one\n# two\n")
    assert "device" not in recipe.read_text()
    again = sources.resolve({"device": "cpu"}, file=recipe)
    assert again == config
    history = runs.run(again, sample, runs.Files(tmp_path / "net.pt")).history
    accuracies = [row["validation_accuracy"] for row in history]
    assert best.accuracy == (max(accuracies) if keep == "best" else accuracies[-1])
    assert 0.3 < best.accuracy < 1


def test_a_recipe_gives_every_configuration_again(tmp_path):
    file = tmp_path / "recipe.toml"
    for name in sources.recipes():
        config = sources.resolve({"eps": 1e-5} if name == "fast" else {}, name)
        file.write_text(sources.as_toml(config))
        assert sources.resolve({}, file=file) == config
    file.write_text(sources.as_toml(TrainConfig(device="cpu", stream=True)))
    assert file.read_text() == 'dataset = "mnist"\n'


def outcome(number, state="finished", accuracy=None, **options):
    return Outcome(number, state, accuracy, 1, 1.0, options, "")


def test_the_picture_of_the_trials(tmp_path):
    trials = [
        outcome(0, accuracy=0.90),
        outcome(1, accuracy=0.92),
        outcome(2, "pruned", 0.10),
        outcome(3, "refused"),
        outcome(4, accuracy=0.91),
        outcome(5, "pruned", 0.905),
        outcome(7, accuracy=0.93),
    ]
    figure = search_plots.history(trials, "Trials")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["best, 93.00%"].get_ydata() == pytest.approx([0.90, 0.92, 0.92, 0.93, 0.93])
    assert list(lines["trained to the end"].get_xdata()) == [0, 1, 4, 7]
    assert list(lines["pruned, at its last epoch"].get_xdata()) == [5]
    low, high = axes.get_ylim()
    assert 0.8 < low < 0.90
    assert 0.93 < high < 1
    below = [line for line in axes.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in below] == [[2]]
    assert any(line.get_marker() == "|" and list(line.get_xdata()) == [3] for line in axes.lines)
    assert figure.get_suptitle() == "Trials\n7 trials: 4 trained to the end, 2 pruned, 1 refused"
    (path,) = pictures.write(tmp_path, [("history", figure)])
    with Image.open(path) as image:
        assert image.size == (1000, 500)
    search_plots.history([outcome(0, accuracy=1.0)], "One")  # no range to show


def test_importance(make, sample):
    study = make("learning_rate = [1e-7, 0.02]\nlabel_smoothing = { low = 0.0, high = 0.001 }", epochs=1)
    with pytest.raises(ValueError, match="that takes 10 trials trained to the end, and there are 0"):
        study.importance()
    study.run(sample[0], 20)
    parts, best = study.importance()
    assert best == 5
    assert sum(parts.values()) == pytest.approx(1)
    assert set(parts) == {"learning_rate", "label_smoothing"}
    figure = search_plots.importance(parts, best, 20, "Options")
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == sorted(parts, key=parts.get)
    assert [bar.get_width() for bar in figure.axes[0].patches] == sorted(parts.values())
    one = make("dropout = [0.0, 0.1]", name="one")
    with pytest.raises(ValueError, match="only one option is varied"):
        one.importance()
    alike = make("learning_rate = [1e-9, 2e-9]\nlabel_smoothing = [0.0, 1e-9]", name="alike", epochs=1)
    alike.run(sample[0], 10)
    with pytest.raises(ValueError, match="the trials are too much alike"):
        alike.importance()


# --- the command


@pytest.fixture
def data_folder(sample, tmp_path, monkeypatch):
    """The sample as Fashion-MNIST's files; those of the test set cannot be read as images."""
    train, _ = sample
    files = {
        TRAIN_IMAGES: idx(train.images.numpy()[:, 0]),
        TRAIN_LABELS: idx(train.labels.numpy().astype(np.uint8)),
        TEST_IMAGES: b"nobody looks at these images",
        TEST_LABELS: b"nor at these labels",
    }
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(DATASETS, MODEL, replace(DATASETS[MODEL], sha256=hashes, debian_folder=None))
    folder = tmp_path / "data"
    (folder / MODEL).mkdir(parents=True)
    for name, content in files.items():
        (folder / MODEL / name).write_bytes(content)
    with pytest.raises(data.DataError, match="not an IDX file"):
        data.load_test(DATASETS[MODEL], folder)
    return folder


@pytest.fixture
def search(data_folder, tmp_path, monkeypatch, capsys):
    """Runs the command in tmp_path; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.commands.parts.console.width", 200)
    (tmp_path / "space.toml").write_text(SMALL)

    def search(*words, **changes):
        options = [
            word
            for name, value in (BASE | {"hidden": 16} | changes).items()
            if value is not None
            for word in ("--" + name.replace("_", "-"), str(value))
        ]
        space_words = [] if "--space" in words else ["--space", "space.toml"]
        code = main(["search", *words, *space_words, "--data-dir", str(data_folder), *options])
        return code, *capsys.readouterr()

    return search


def test_the_command_searches_without_the_test_set_and_goes_on(search, tmp_path, sample):
    code, out, err = search("--trials", "11")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1] == f"study: runs/search-{MODEL}.db, 0 trials so far"
    assert lines[2] == "on cpu (asked for), seed 0"
    assert re.fullmatch(
        r"trial 0: \d+\.\d\d% in \d+\.\d s, the best so far: "
        r"learning_rate 0\.0\d+, dropout 0\.\d, activation (relu|tanh)",
        lines[3],
    )
    assert sum(line.startswith("trial ") for line in lines) == 11
    assert "the best of 11 trials" in out
    assert len(re.findall(r"^│ +\d+ │ +\d+\.\d\d% │", out, re.MULTILINE)) == 5
    assert lines[-1] == f"python -m trainer train --config runs/search-{MODEL}.toml --device cpu"
    runs_folder = tmp_path / "runs"
    recipe = (runs_folder / f"search-{MODEL}.toml").read_text()
    best = re.search(r"trial (\d+), (\d+\.\d\d)% of 100 validation images", recipe)
    assert recipe.startswith(f"# The best of 11 trials in search-{MODEL}.db: trial ")
    assert re.search(rf"│ +{best[1]} │ +{best[2]}% │", out)
    assert "# Varied: --learning-rate, --dropout, --activation.\n" in recipe
    with Image.open(runs_folder / f"search-{MODEL}-history.png") as image:
        image.verify()

    code, out, err = search("--trials", "2")
    assert (code, err) == (0, "")
    assert "11 trials so far" in out
    assert "\ntrial 11: " in out
    assert "\ntrial 12: " in out
    assert "the best of 13 trials" in out

    code, out, err = search("--trials", "0")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "the best of 13 trials".ljust(len(out.splitlines()[0]))
    assert "of 13 trials" in (runs_folder / f"search-{MODEL}.toml").read_text()


def test_ctrl_c_keeps_the_trials_that_have_ended(search, tmp_path, monkeypatch):
    prepare, prepared = runs.prepare, []

    def interrupted(*arguments):
        prepared.append(arguments)
        if len(prepared) == 3:
            signal.raise_signal(signal.SIGINT)
        return prepare(*arguments)

    monkeypatch.setattr(runs, "prepare", interrupted)
    code, out, err = search("--study", "mine/deep.db")
    assert code == 130
    assert err == "stopped; mine/deep.db keeps the 2 trials of this run that had ended; the same command adds others\n"
    assert not (tmp_path / "mine" / "deep.toml").exists()
    code, out, err = search("--study", "mine/deep.db", "--trials", "1")
    assert "mine/deep.db, 3 trials so far" in out
    assert "the best of 4 trials" in out
    assert "no picture of the options' importance: that takes 10 trials trained to the end, and there are 3" in out
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        ".deep.db.lock",
        "deep-history.png",
        "deep.db",
        "deep.toml",
    ]


def test_refused_trials_are_told_with_the_reason(search, tmp_path):
    (tmp_path / "hidden.toml").write_text("hidden = [[], [8]]\nbatch_norm = [false, true]")
    code, out, _ = search("--trials", "8", "--space", "hidden.toml", hidden=None, epochs=1)
    assert code == 0
    assert re.search(
        r"^trial \d: refused: --batch-norm has nothing to act on .*: hidden none, batch_norm true$", out, re.M
    )


def test_no_trial_that_was_trained_to_the_end(search, tmp_path, make):
    make(name="empty")
    code, _, err = search("--trials", "0", "--study", "empty.db")
    assert (code, err) == (1, "error: empty.db: none of its 0 trials was trained to the end\n")


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["--trials", "0"], 1, "error: runs/search-fashion-mnist.db is missing: there is nothing to report"),
        (["--space", "wide"], 2, "error: --space: got 'wide', want one of default, or the path of a .toml file"),
        (["--space", "none.toml"], 2, "error: none.toml: No such file or directory"),
        (["--dropout", "0.1"], 2, "error: --dropout cannot be fixed: space.toml varies it; leave it out here, or in"),
        (["--recipe", "fast", "--config", "no.toml"], 2, "error: no.toml: No such file or directory"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(search, tmp_path, words, code, problem):
    found, _, err = search(*words)
    assert found == code
    assert problem in err
    assert not (tmp_path / "runs").exists()


def test_a_wrong_number_of_trials(search, capsys):
    with pytest.raises(SystemExit):
        search("--trials", "-1")
    assert "--trials: got '-1', want 0 or more; 0 reports what the study has" in capsys.readouterr().err


def test_what_is_not_installed_is_told(search, monkeypatch):
    monkeypatch.delitem(sys.modules, "trainer.search")
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, err = search()
    assert code == 1
    assert re.match(r"error: the search needs Optuna \(.*optuna.*\): pip install 'parityserve\[search\]'\n", err)


def test_a_search_is_complete_without_pictures(search, tmp_path, monkeypatch):
    for name in ("plots", "pictures", "search_plots"):
        monkeypatch.delitem(sys.modules, f"trainer.{name}")
        monkeypatch.delattr(f"trainer.{name}")
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    code, out, _ = search("--trials", "1")
    assert code == 0
    assert "the best of 1 trial " in out
    assert "no pictures were drawn: pictures need matplotlib" in out
    assert ": pip install 'parityserve[plots]'\n" in out
    assert (tmp_path / "runs" / f"search-{MODEL}.toml").exists()
