"""benchmarks/training.py: its figures, and a real training measured by it."""

import json

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import plot_training, training
from benchmarks.training import COURSE, RECIPE, Run


def test_means_deviations_and_the_ratio_of_the_seconds(capsys):
    runs = [
        Run(RECIPE, 0, 4.0, 6, 0.990, 225_034),
        Run(RECIPE, 1, 6.0, 6, 0.992, 225_034),
        Run(COURSE, 0, 100.0, 4, 0.991, 225_034),
    ]
    options = training._parser().parse_args(["--recipe", "fast"])
    training._print(runs, options, Console(width=200))
    lines = [[word.strip() for word in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["fast", "2", "225,034", "6", "5.00 ± 1.41", "99.10 ± 0.14"] in lines
    assert ["the course's loop", "1", "225,034", "4", "100.00", "99.10"] in lines
    training._print(runs, options, Console(width=200))
    assert capsys.readouterr().out.splitlines()[-1] == "the course's loop takes 20.0 times as long"


@pytest.mark.data
def test_a_recipe_is_trained_in_a_process_of_its_own(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert training.main(["--recipe", "fast", "--seeds", "1", "--first-seed", "3", "--json", str(report)]) == 0
    (run,) = json.loads(report.read_text())["runs"]
    assert (run["kind"], run["seed"], run["epochs"], run["parameters"]) == (RECIPE, 3, 6, 225_034)
    assert run["seconds"] > 0
    assert run["test_accuracy"] > 0.988  # the mean is 0.9904
    assert f"recipe, seed 3: {run['seconds']:.2f} s" in capsys.readouterr().out


def test_accuracies_are_drawn(tmp_path, capsys):
    runs = [{"kind": RECIPE, "seed": seed, "test_accuracy": 0.99 + seed / 1000} for seed in range(3)]
    path, picture = tmp_path / "report.json", tmp_path / "accuracy.png"
    path.write_text(json.dumps({"recipe": "fast", "runs": runs}))
    assert plot_training.main([str(path), str(path), str(picture), "--wanted", "99", "99.5"]) == 0
    with Image.open(picture) as drawn:
        assert drawn.width > drawn.height > 300
    path.write_text("{}")
    assert plot_training.main([str(path), str(picture), "--wanted", "99"]) == 1
    assert "want files of python -m benchmarks.training --json" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot_training.main([str(path), str(picture), "--wanted", "99", "98"])
    assert "got 2 numbers for 1 reports" in capsys.readouterr().err


def test_an_unknown_recipe_is_told(capsys):
    with pytest.raises(SystemExit):
        training.main(["--recipe", "quick"])
    assert "invalid choice: 'quick' (choose from" in capsys.readouterr().err
