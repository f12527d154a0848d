"""Event files, read back by TensorBoard's own reader."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer import pictures, plots
from trainer.events import EventWriter

ROOT = Path(__file__).parents[1]


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_each_epoch_is_on_the_disk_before_the_next_begins(checkpoint, tmp_path):
    writer = EventWriter(tmp_path, "fashion-mnist")
    for done, metrics in enumerate(checkpoint.history, 1):
        writer.epoch(metrics)
        assert len(read(writer.path).Scalars("loss/train")) == done
    events = read(writer.path)
    names = {"loss/train": "train_loss", "loss/validation": "validation_loss"}
    names |= {"accuracy/validation": "validation_accuracy", "training/learning_rate": "learning_rate"}
    assert set(names) <= set(events.Tags()["scalars"])
    for tag, name in names.items():
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3, 4]
        want = [row[name] for row in checkpoint.history]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(want, rel=1e-6)
    assert not any("epoch" in tag for tag in events.Tags()["scalars"])
    writer.close()


def test_what_was_not_measured_is_not_written(tmp_path):
    writer = EventWriter(tmp_path, "run")
    writer.epoch({"epoch": 1, "train_loss": 0.5, "validation_loss": None})
    assert read(writer.path).Tags()["scalars"] == ["loss/train"]
    writer.close()


def test_pictures_are_those_that_are_drawn(checkpoint, sample, tmp_path):
    subject = pictures.of_checkpoint(checkpoint, Path("net.pt"))
    writer = EventWriter(tmp_path, "run")
    writer.epoch(checkpoint.history[-1])
    writer.pictures(pictures.figures(subject, sample[1], [3]))
    writer.close()
    events = read(writer.path)
    drawn = dict(pictures.figures(subject, sample[1], [3]))
    assert set(events.Tags()["images"]) == set(drawn)
    for name in ("curves", "feature-maps-3"):
        (event,) = events.Images(name)
        assert event.step == 4
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            np.testing.assert_array_equal(np.asarray(image), plots.raster(drawn[name]))


def test_two_runs_do_not_share_a_folder(tmp_path):
    writers = [EventWriter(tmp_path, "run") for _ in range(2)]
    assert writers[0].path != writers[1].path
    for writer in writers:
        assert writer.path.parent == tmp_path
        writer.close()


def test_without_tensorboard_the_extra_is_named_before_anything_is_trained(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard'] = None; import trainer.__main__ as m; "
        f"sys.exit(m.main(['train', '--tensorboard', {str(tmp_path / 'events')!r}, '--data-dir', '/nowhere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: event files need tensorboard (")
    assert "pip install 'parityserve[tensorboard]', or leave --tensorboard out" in done.stderr
    assert not (tmp_path / "events").exists()
