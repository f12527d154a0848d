"""Trainings that are interrupted, resumed, refused, or done by several processes."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL

from serving.bundle import open_bundle
from serving.errors import DeviceError
from trainer import processes, runs, train
from trainer.checkpoint import CheckpointError, load
from trainer.config import TrainConfig
from trainer.export import export

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("train_on_sample.py")
BASE = {
    "dataset": MODEL,
    "device": "cpu",
    "epochs": 5,
    "batch_size": 70,
    "validation_images": 100,
    "channels": [4],
    "hidden": [16],
    "pool": 4,
}
# Between them, everything that a resumed training must have kept.
TRAININGS = {
    "adamw, one cycle, all that is drawn": {
        "batch_norm": True,
        "dropout": 0.3,
        "shift": 2,
        "flip": True,
        "erase": 0.5,
        "ema": 0.9,
        "keep": "best",
        "init": "kaiming-normal",
    },
    "sgd, momentum, plateau, early stopping": {
        "optimiser": "sgd",
        "nesterov": True,
        "schedule": "plateau",
        "patience": 0,
        "early_stopping": 2,
        "l1": 1e-4,
        "clip_norm": 1.0,
    },
    "rmsprop, fp16, contiguous": {
        "optimiser": "rmsprop",
        "centered": True,
        "schedule": "step",
        "precision": "fp16",
        "channels_last": False,
    },
    "adam, cosine, bf16": {"optimiser": "adam", "schedule": "cosine", "warm_up": 0.2, "precision": "bf16"},
}


def config(**changes):
    return TrainConfig(**BASE | changes)


def run(sample, path, training, **arguments):
    return runs.run(training, sample, runs.Files(path), **arguments)


class Interrupted(Exception):
    pass


def interrupt_after(epoch):
    def on_epoch(metrics):
        if metrics.epoch == epoch:
            raise Interrupted

    return runs.Watcher(on_epoch=on_epoch)


def same(one, two):
    """Whether two checkpoints have the same weights, bit for bit, and tell the same but for the time it took."""
    timeless = [
        [{key: value for key, value in row.items() if key not in ("seconds", "images_per_s")} for row in each.history]
        for each in (one, two)
    ]
    assert timeless[0] == timeless[1]
    assert one.test_accuracy == two.test_accuracy
    assert one.weights.keys() == two.weights.keys()
    return all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)


def start(order, *words, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words, str(SCRIPT), json.dumps(order)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.mark.parametrize("name", TRAININGS)
def test_a_resumed_training_gives_the_same_weights_bit_for_bit(sample, tmp_path, name):
    training = config(**TRAININGS[name])
    whole = run(sample, tmp_path / "whole.pt", training)
    assert len(whole.history) >= 2
    with pytest.raises(Interrupted):
        run(sample, tmp_path / "net.pt", training, watcher=interrupt_after(2))
    assert not (tmp_path / "net.pt").exists()
    torch.manual_seed(99)  # whatever a new process begins with
    assert same(run(sample, tmp_path / "net.pt", training, resume=True), whole)
    assert same(load(tmp_path / "net.pt"), whole)


def test_a_killed_training_goes_on_to_the_same_weights_bit_for_bit(sample, tmp_path):
    """A process of its own, ended by SIGKILL between two epochs, and once more in the middle of one."""
    options = BASE | TRAININGS["adamw, one cycle, all that is drawn"]
    whole, killed = run(sample, tmp_path / "whole.pt", TrainConfig(**options)), tmp_path / "killed.pt"
    order = {"options": options, "checkpoint": str(killed)}
    first = start(order | {"kill_after_epoch": 2})
    assert (first.returncode, first.stdout) == (-signal.SIGKILL, "epoch 1\nepoch 2\n")
    second = start(order | {"resume": True, "kill_at_step": 11})  # of eight steps an epoch
    assert (second.returncode, second.stdout) == (-signal.SIGKILL, "epoch 3\n")
    assert not killed.exists()
    third = start(order | {"resume": True})
    assert (third.returncode, third.stdout) == (0, "epoch 4\nepoch 5\n")
    assert same(load(killed), whole)
    assert sorted(path.name for path in tmp_path.iterdir() if "killed" in path.name) == [
        "killed.best.pt",
        "killed.last.pt",
        "killed.pt",
    ]


def test_the_files_of_every_epoch_and_of_the_best(sample, tmp_path):
    seen = []

    def on_epoch(metrics):
        last, best = load(tmp_path / "net.last.pt"), load(tmp_path / "net.best.pt")
        seen.append((len(last.history), len(best.history)))
        assert last.test_accuracy is None

    run(sample, tmp_path / "net.pt", config(), watcher=runs.Watcher(on_epoch=on_epoch))
    assert [last for last, _ in seen] == [1, 2, 3, 4, 5]
    accuracies = [row["validation_accuracy"] for row in load(tmp_path / "net.pt").history]
    best = load(tmp_path / "net.best.pt")
    assert accuracies[len(best.history) - 1] == max(accuracies)
    _, validation = runs.divide(sample[0], config())
    assert train.evaluate(best.build(), validation)[1] == max(accuracies)


def test_the_best_epoch_can_be_exported_before_training_ends(sample, tmp_path):
    with pytest.raises(Interrupted):
        run(sample, tmp_path / "net.pt", config(), watcher=interrupt_after(2))
    bundle, _ = export(load(tmp_path / "net.best.pt"), sample[1], tmp_path / "exported")
    accuracy = open_bundle(bundle.path).manifest.test_accuracy
    assert accuracy.n == 150
    assert accuracy.value == train.evaluate(load(tmp_path / "net.best.pt").build(), sample[1])[1]


@pytest.fixture(scope="module")
def interrupted(sample, tmp_path_factory):
    path = tmp_path_factory.mktemp("interrupted") / "net.pt"
    with pytest.raises(Interrupted):
        run(sample, path, config(schedule="constant"), watcher=interrupt_after(1))
    return path


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"channels": [8]}, r"--channels is \(8,\) here and \(4,\) there"),
        ({"dataset": "mnist"}, "--dataset is mnist here and fashion-mnist there"),
        ({"network": "mlp", "channels": [], "pool": 2}, "--network is mlp here and cnn there; --channels is "),
        ({"seed": 5, "shift": 1}, "--shift is 1 here and 0 there; --seed is 5 here and 0 there"),
    ],
)
def test_another_training_is_refused_by_name(sample, interrupted, change, problem):
    before = interrupted.with_name("net.last.pt").read_bytes()
    with pytest.raises(CheckpointError, match=f"the checkpoint is of another training: .*{problem}"):
        run(sample, interrupted, config(**{"schedule": "constant", **change}), resume=True)
    assert interrupted.with_name("net.last.pt").read_bytes() == before


def test_another_number_of_processes_is_refused(interrupted):
    checkpoint = load(interrupted.with_name("net.last.pt"))
    with pytest.raises(CheckpointError, match="2 processes train here and 1 did there"):
        checkpoint.check_resumable(checkpoint.config, 2)


def test_epochs_may_be_added_where_the_schedule_does_not_count_them(sample, interrupted, tmp_path):
    for name in ("net.last.pt", "net.best.pt"):
        (tmp_path / name).write_bytes(interrupted.with_name(name).read_bytes())
    longer = config(schedule="constant", epochs=7)
    resumed = run(sample, tmp_path / "net.pt", longer, resume=True)
    assert same(resumed, run(sample, tmp_path / "whole.pt", longer))
    with pytest.raises(Interrupted):
        run(sample, tmp_path / "cycle.pt", config(), watcher=interrupt_after(1))
    with pytest.raises(CheckpointError, match="--epochs is 7 here and 5 there"):
        run(sample, tmp_path / "cycle.pt", config(epochs=7), resume=True)


def test_nothing_to_resume(sample, tmp_path):
    with pytest.raises(CheckpointError, match=r"net\.last\.pt is missing"):
        run(sample, tmp_path / "net.pt", config(), resume=True)
    with pytest.raises(CheckpointError, match=r"nothing to resume: .*net\.last\.pt is missing; train without --resume"):
        runs.saved_options(runs.Files(tmp_path / "net.pt"))
    run(sample, tmp_path / "net.pt", config(epochs=1))
    with pytest.raises(CheckpointError, match="of a finished training, and holds nothing to go on from"):
        load(tmp_path / "net.pt").check_resumable(config(epochs=1), 1)


def test_a_finished_training_is_finished_when_resumed(sample, tmp_path):
    whole = run(sample, tmp_path / "net.pt", config(epochs=2))
    (tmp_path / "net.pt").unlink()
    assert same(run(sample, tmp_path / "net.pt", config(epochs=2), resume=True), whole)


# --- several processes


@pytest.mark.parametrize("extra", [{}, {"ema": 0.8, "l2": 1e-3, "clip_norm": 1.0, "optimiser": "sgd"}])
def test_two_processes_train_as_one_does(sample, tmp_path, extra):
    """The same global batches, so the same weights but for rounding; one process writes and speaks."""
    options = BASE | {"epochs": 3, "batch_size": 71, "flip": False, **extra}  # shares of unequal size
    order = {"options": options, "checkpoint": str(tmp_path / "two.pt")}
    done = start(order, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "epoch 1\nepoch 2\nepoch 3\n"
    two, one = load(tmp_path / "two.pt"), run(sample, tmp_path / "one.pt", TrainConfig(**options))
    for mine, theirs in zip(one.history, two.history, strict=True):
        for key in ("train_loss", "validation_loss"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-3)
        assert theirs["validation_accuracy"] == pytest.approx(mine["validation_accuracy"], abs=0.021)
    assert two.test_accuracy == pytest.approx(one.test_accuracy, abs=0.021)
    for name, tensor in one.weights.items():
        torch.testing.assert_close(two.weights[name], tensor, atol=2e-3, rtol=2e-2)
    assert math.isclose(train.evaluate(two.build(), sample[1])[1], two.test_accuracy, abs_tol=1e-6)


def test_two_processes_resume_bit_for_bit_with_a_last_batch_of_one(tmp_path):
    """496 images make a last batch of one, of which the second process has no part."""
    options = BASE | {"epochs": 3, "batch_size": 45, "train_images": 496, "dropout": 0.2, "shift": 1}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    whole = {"options": options, "checkpoint": str(tmp_path / "whole.pt")}
    done = start(whole, *torchrun)
    assert done.returncode == 0, done.stderr
    killed = whole | {"checkpoint": str(tmp_path / "killed.pt")}
    assert start(killed | {"kill_after_epoch": 1}, *torchrun).returncode != 0
    assert not (tmp_path / "killed.pt").exists()
    done = start(killed | {"resume": True}, *torchrun)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "epoch 2\nepoch 3\n"
    assert same(load(tmp_path / "killed.pt"), load(tmp_path / "whole.pt"))


@pytest.mark.parametrize(
    ("options", "count", "problem"),
    [
        ({"batch_size": 499}, 1, "the last of 500 images are a batch of 1"),
        ({"batch_size": 71}, 2, "the last of 500 images are a batch of 3, shared by 2 processes"),
    ],
)
def test_batch_norm_needs_two_images_in_every_share(sample, options, count, problem):
    training = config(batch_norm=True, **options)
    fitting, validation = runs.divide(sample[0], training)
    with pytest.raises(
        ValueError, match=f"--batch-norm needs 2 images at least, and {problem}; choose another --batch-size"
    ):
        train.Training(train.build(training), fitting, validation, training, processes=processes.Processes(0, count))


def test_one_device_is_not_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(DeviceError, match="--device cuda:1 is one device, and 2 processes were started"),
        processes.join("cuda:1"),
    ):
        pass
