"""docs/courses.md: each of its commands is accepted as it stands, and run on a sample in a small form."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import trainer.__main__
import trainer.commands.export
from serving.options import given
from trainer import sources, studies
from trainer.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "courses.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]

TRAINING = ["--train-images", "200", "--validation-images", "100", "--epochs", "1", "--device", "cpu"]
# What makes a command small; the last of an option that is given twice counts.
SMALL = {
    "train": TRAINING,
    "ablate": [*TRAINING, "--seeds", "1"],
    "search": [*TRAINING, "--trials", "1"],
    "parity": ["--device", "cpu"],
    "examples/devices.py": ["--seconds", "0.01", "--sizes", "32", "64", "--batches", "8"],
}
# Run by other tests, with all that it draws.
ELSEWHERE = ["python -m trainer plots --bundle exported/mnist --images 0,18"]
# What the page tells to look for, as far as it does not depend on what was learnt: output, or files.
TOLD = {
    "python examples/tensors.py": [
        r"\(pixels \+ 10\)\.tolist\(\) = \[4, 5\]",
        r"float16: 0\.33325",
        r"float32: 0\.33333334",
        r"copy\.tolist\(\) = \[0\.0, 1\.0",
        r"\[3, 2\] @ \[3, 2\] is refused: mat1 and mat2 shapes cannot be multiplied",
    ],
    "python -m trainer data --dataset mnist": ["data: mnist, 4 files with the right sha256"],
    "python -m trainer summary --network cnn": [
        *(r"Conv2d .*\[1, 32, 26, 26\]", r"MaxPool2d .*\[1, 32, 13, 13\]", r"Conv2d .*\[1, 64, 11, 11\]"),
        *(r"MaxPool2d .*\[1, 64, 5, 5\]", r"\[1, 1600\]", "204,928", "225,034"),
    ],
    "python -m trainer doctor": ["auto"],
    "python examples/devices.py": ["product of two 64 x 64 matrices", "step of training cnn with 8 images"],
    "python -m trainer plots --checkpoint runs/epochs.pt": ["FILE runs/epochs-plots/curves.png"],
    "python -m trainer ablate --study filters --dataset fashion-mnist": [
        *(r"\+?-?\d+\.\d\d .* no ", "55,098", "FILE runs/ablation-filters-fashion-mnist.png"),
    ],
    "python -m trainer ablate --study depth --dataset fashion-mnist": ["693,962", "113,386", "24,330"],
    "python -m trainer plots --checkpoint runs/fashion-mnist.pt --images 0,23,28 --output runs/maps": [
        *(f"FILE runs/maps/feature-maps-{index}.png" for index in (0, 23, 28)),
    ],
    "python -m trainer train --dataset mnist --epochs 10 --checkpoint runs/long.pt --resume": ["resumed after epoch 1"],
    "python -m trainer parity --bundle exported/mnist": ["pass"],
}


def kind(command):
    words = shlex.split(command)
    return words[3] if words[:3] == ["python", "-m", "trainer"] else words[1]


def run(command, capsys, monkeypatch):
    """A command in its small form, in this process; gives what it printed."""
    words = [*shlex.split(command), *([] if "--list" in command else SMALL.get(kind(command), []))]
    if words[1] == "-m":
        assert trainer.__main__.main(words[3:]) == 0, f"{command}: {capsys.readouterr().err}"
    else:
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    return capsys.readouterr().out


def test_the_page_has_a_command_for_every_topic():
    assert len(COMMANDS) > 40
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert len(sections) >= 19
    for section in sections:
        assert "```sh" in section, section.splitlines()[0]
        assert section.count("Look for:") == (0 if section.startswith("The data\n") else 1), section.splitlines()[0]
    assert {kind(command) for command in COMMANDS} == {
        *("examples/tensors.py", "examples/devices.py", "data", "train", "summary", "doctor", "plots", "ablate"),
        *("search", "export", "parity"),
    }
    assert {*TOLD, *ELSEWHERE} <= set(COMMANDS)
    links = re.findall(r"\]\(([\w.]+)(?:#\w+)?\)", PAGE)
    assert all((ROOT / "docs" / link).is_file() for link in links)
    used = {words[words.index("--study") + 1] for words in map(shlex.split, COMMANDS) if "--study" in words}
    assert used == set(studies.names())


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("python -m trainer")])
def test_each_command_is_accepted_with_its_values(command):
    options = trainer.__main__.parser().parse_args(shlex.split(command)[3:])  # exits when it is not
    values = given(TrainConfig, options)
    if kind(command) in ("train", "summary"):
        sources.resolve(values, options.recipe, options.config)
    elif kind(command) == "ablate" and options.study:
        studies.resolve(options.study, values, options.recipe, options.config)
    if "--checkpoint" in command and kind(command) != "train":
        written = [line for line in COMMANDS[: COMMANDS.index(command)] if f"--checkpoint {options.checkpoint}" in line]
        assert written or options.checkpoint == Path("runs/mnist.pt"), f"no command before writes {options.checkpoint}"


def test_every_command_runs_in_the_pages_order(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(
        trainer.commands.export, "_draw_beside", lambda *_: None
    )  # of an export: as plots draws, and slow
    lines = {}
    for command in COMMANDS:
        if kind(command) == "search" or command in ELSEWHERE:
            continue
        lines[command] = run(command, capsys, monkeypatch)
        for told in TOLD.get(command, []):
            if told.startswith("FILE "):
                assert Path(told.removeprefix("FILE ")).is_file(), f"{command}: {told}"
            else:
                assert re.search(told, lines[command]), f"{command}: {told} is not in\n{lines[command]}"
    once, again, another = (
        re.findall(r"training loss \S+|accuracy\S* \S+%", printed)
        for command, printed in lines.items()
        if "--seed " in command
    )
    assert once == again != another
    assert len(once) == 3


def test_the_search_runs(small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (command,) = [command for command in COMMANDS if kind(command) == "search"]
    run(command, capsys, monkeypatch)
    assert list(Path("runs").rglob("*.toml"))  # the best configuration, as a recipe
