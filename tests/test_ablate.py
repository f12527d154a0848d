"""Studies: what they are, what is wrong with one, how they are trained, and what is made of the figures."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MODEL
from PIL import Image

import trainer.__main__
from trainer import ablate, checkpoint, data, plots, runs, studies, train
from trainer.commands import ablate as command
from trainer.models import Network, count_parameters

ROOT = Path(__file__).parents[1]
SMALL = {"dataset": MODEL, "device": "cpu", "epochs": 2, "batch_size": 50, "validation_images": 200}
STUDY = """
question = "How wide?"

[base]
channels = [4]
pool = 4

[variants.narrow]
hidden = [8]

[variants.wide]
hidden = [32]
dropout = 0.2
"""


@pytest.fixture
def study(tmp_path):
    return studies.resolve(write(tmp_path, STUDY), SMALL)


def write(folder, text):
    (folder / "width.toml").write_text(text)
    return str(folder / "width.toml")


def refusal(folder, text, options=SMALL, **others):
    with pytest.raises(ValueError, match=r"\w") as caught:
        studies.resolve(write(folder, text), options, **others)
    return str(caught.value).replace(f"{folder}/", "")


def fake(variant, seed, accuracy, **others):
    figures = {"parameters": 7, "train_accuracy": 1.0, "test_accuracy": None, "epochs": 1, "seconds": 2.0}
    named = {"variant": variant, "seed": seed, "options": {}, "device": "cpu", "validation_accuracy": accuracy}
    return ablate.Result(**{**named, **figures, "images_per_s": 10.0, **others})


# What a study is.


@pytest.mark.parametrize("dataset", data.DATASETS)
@pytest.mark.parametrize("name", studies.names())
def test_every_study_of_ours_can_be_trained_and_its_variants_differ_in_what_they_name(name, dataset):
    study = studies.resolve(name, {"dataset": dataset})
    assert study.dataset == dataset
    for variant in study.variants:
        dumped = variant.config.model_dump(mode="json")
        assert {key: dumped[key] for key in variant.changes} == variant.changes
        Network(variant.config)


def test_the_networks_of_ours_have_the_sizes_that_they_are_compared_for():
    def parameters(name):
        found = studies.resolve(name, {}).variants
        return {variant.name: count_parameters(Network(variant.config)) for variant in found}

    assert parameters("filters") == {"32 filters": 113_386, "16 filters": 55_098, "64 filters": 243_786}
    assert parameters("networks") == {"mlp": 59_850, "convnet": 113_386, "cnn": 225_034}
    depth = parameters("depth")
    assert depth["two convolutions"] == 113_386
    assert depth["one convolution"] == 320 + (13 * 13 * 32 + 1) * 128 + 1290
    assert depth["three convolutions"] == 320 + 2 * 9248 + (32 + 1) * 128 + 1290
    assert len(set(parameters("optimisers").values())) == 1


def test_a_variants_options_come_before_those_given_before_the_recipe_before_the_base(tmp_path):
    text = "[base]\nbatch_size = 32\nl2 = 0.5\n[variants.a]\n[variants.b]\nl1 = 0.5\nepochs = 4\n"
    path = write(tmp_path, f'question = "?"\n{text}')
    given = {"epochs": "3", "validation_images": "100"}
    study = studies.resolve(path, given, recipe="course-mnist")
    a, b = (variant.config for variant in study.variants)
    assert (a.batch_size, a.l1, a.l2, a.epochs, a.optimiser) == (64, 0.0, 0.5, 3, "adam")
    assert (b.batch_size, b.l1, b.l2, b.epochs, b.validation_images) == (64, 0.5, 0.5, 4, 100)
    assert study.base["epochs"] == "3"
    assert "dataset" not in study.base


def test_options_are_written_as_a_command_line_has_them():
    options = {"channels": [16, 32], "hidden": [], "batch_norm": True, "shuffle": False, "learning_rate": 1e-3}
    line = "--channels 16,32 --hidden none --batch-norm --no-shuffle --learning-rate 0.001"
    assert studies.as_options(options) == line
    parsed = trainer.__main__.parser().parse_args(["train", *line.split()])
    assert (parsed.batch_norm, parsed.shuffle, parsed.hidden) == (True, False, "none")


def test_the_documents_example_is_a_study(tmp_path):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```toml\n(question.*?)^```", text, re.MULTILINE | re.DOTALL)
    study = studies.resolve(write(tmp_path, example), {})
    assert [(variant.config.activation, variant.config.epochs) for variant in study.variants] == [
        ("relu", 5),
        ("gelu", 5),
    ]


# What is wrong with one.


def test_a_study_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"--study: got 'filtres' \(did you mean filters\?\), want one of augment.*toml"
    ):
        studies.resolve("filtres", {})
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        studies.resolve("none.toml", {})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("question = ", "width.toml: not TOML: Invalid value"),
        ('question = "?"\nvariant = 1', "no such key: variant (did you mean variants?), want question, base, variants"),
        ("question = 3", "width.toml: question: got 3, want a text"),
        ('question = "?"\n[variants.a]', "variants: got {'a': {}}, want two tables at least, such as [variants.wide]"),
        ('question = "?"\nbase = 1\n[variants]\na = 1\nb = {}', "width.toml: base: got 1, want a table of options"),
        ('question = "?"\nbase = 1\n[variants]\na = 1\nb = {}', "width.toml: variant 'a': got 1, want a table of opti"),
        (f"{STUDY}dropuot = 1", "width.toml: variant 'wide': no such option: dropuot (did you mean dropout?)"),
        (STUDY.replace("pool", "poool"), "width.toml: base: no such option: poool (did you mean pool?)"),
        (f"{STUDY}seed = 1", "width.toml: variant 'wide': seed must be the same for all variants: give --seed"),
        (f"{STUDY}validation_images = 1", "variant 'wide': validation_images must be the same for all variants"),
        (f'{STUDY}dataset = "mnist"', "variant 'wide': dataset must be the same for all variants: give --dataset"),
        (f"{STUDY}l1 = 2", "width.toml: variant 'wide': l1: Input should be less than or equal to 1, got 2"),
        (f'{STUDY}init = "zero"', "variant 'wide': init: Input should be 'default', 'xavier-uniform'"),
        (
            f"{STUDY}momentum = 0.5",
            "width.toml: variant 'wide': --momentum is for --optimiser sgd or rmsprop, which is",
        ),
        (f"{STUDY}[variants.same]\nhidden = [8]", "width.toml: variants 'narrow' and 'same' are the same training"),
        (STUDY.replace("pool = 4", "pool = 40"), "width.toml: base: pool: Input should be less than or equal to 28"),
    ],
)
def test_a_file_that_is_no_study_or_has_a_variant_that_cannot_be(tmp_path, text, told):
    assert told in refusal(tmp_path, text)


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    text = STUDY.replace("hidden = [8]", "l1 = -1") + "l2 = -1\n"
    told = refusal(tmp_path, text).splitlines()
    assert [line.split(": Input")[0] for line in told] == [
        "width.toml: variant 'narrow': l1",
        "width.toml: variant 'wide': l2",
    ]


def test_an_option_that_is_wrong_for_all_is_told_once_and_for_some_with_their_names(tmp_path):
    assert refusal(tmp_path, STUDY, SMALL | {"epochs": "no"}).startswith("--epochs: Input should be a valid integer")
    text = f'{STUDY}optimiser = "sgd"\n'
    told = refusal(tmp_path, text, SMALL | {"beta1": 0.5})
    assert told == "width.toml: variant 'wide': --beta1 is for --optimiser adam or adamw, which is sgd here"


def test_an_option_that_every_variant_sets_itself(tmp_path):
    told = refusal(tmp_path, STUDY, SMALL | {"hidden": "9"})
    assert told == "--hidden would change nothing: every variant of width sets it itself"


def test_no_validation_images_to_compare_on(tmp_path):
    told = refusal(tmp_path, STUDY, {}, recipe="course-mnist")
    assert told == ("variants are compared on validation images, and --validation-images is 0; want some, say 5000")


# How it is trained.


def test_variants_take_turns_and_a_training_is_that_of_train(study, sample, tmp_path):
    file = tmp_path / "runs" / "width.json"
    results = ablate.run(study, [3, 4], sample[0], None, file)
    assert [(result.variant, result.seed) for result in results] == [
        ("narrow", 3),
        ("wide", 3),
        ("narrow", 4),
        ("wide", 4),
    ]
    config = study.variants[1].config.model_copy(update={"seed": 4})
    assert results[3].options == config.model_dump(mode="json")
    trained = runs.run(config, sample, runs.Files(tmp_path / "net.pt"))
    fitting, validation = runs.divide(sample[0], config)
    network = checkpoint.load(tmp_path / "net.pt").build()
    assert results[3].validation_accuracy == train.evaluate(network, validation)[1]
    assert (
        results[3].train_accuracy == train.evaluate(network, data.Split(fitting.images[:200], fitting.labels[:200]))[1]
    )
    assert results[3].parameters == count_parameters(network)
    assert results[3].epochs == len(trained.history) == 2
    assert results[3].images_per_s == pytest.approx(2 * 400 / results[3].seconds)
    assert all(result.test_accuracy is None for result in results)
    assert ablate.read(file, study) == results


def test_the_same_seed_gives_the_same_accuracy_and_another_another(study, sample, tmp_path):
    once, again = (ablate.run(study, [0, 1], sample[0], None, tmp_path / name) for name in ("a.json", "b.json"))

    def figures(results):
        return [(result.validation_accuracy, result.train_accuracy) for result in results]

    assert figures(once) == figures(again)
    assert len(set(figures(once))) > 1


def test_what_is_finished_is_taken_up_and_interruption_loses_nothing(study, sample, tmp_path):
    file, trained = tmp_path / "width.json", []

    def stop(images):
        if len(trained) == 2:
            raise KeyboardInterrupt

    watcher = ablate.Watcher(on_step=stop, on_result=trained.append)
    with pytest.raises(KeyboardInterrupt):
        ablate.run(study, [0, 1], sample[0], None, file, watcher)
    kept = ablate.read(file, study)
    assert kept == trained
    assert len(kept) == 2
    started = []
    watcher = ablate.Watcher(on_start=lambda *what: started.append(what))
    results = ablate.run(study, [0, 1], sample[0], None, file, watcher)
    assert started == [("narrow", 1, 800, 2), ("wide", 1, 800, 3)]
    assert results[:2] == kept  # to the very seconds
    assert ablate.run(study, [1], sample[0], None, file, watcher) == results[2:]
    assert len(started) == 2
    assert len(ablate.read(file, study)) == 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_test_set_is_measured_where_it_is_given_and_trainings_without_are_repeated(study, sample, tmp_path):
    file = tmp_path / "width.json"
    without = ablate.run(study, [0], sample[0], None, file)
    tested = ablate.run(study, [0], *sample, file)
    for result in tested:
        config = next(variant.config for variant in study.variants if variant.name == result.variant)
        assert result.test_accuracy == runs.run(config, sample, runs.Files(tmp_path / "net.pt")).test_accuracy
    assert [result.validation_accuracy for result in tested] == [result.validation_accuracy for result in without]
    assert ablate.compare(study, tested)[0].test is not None
    untested = ablate.run(study, [0], sample[0], None, file)
    assert [result.test_accuracy for result in untested] == [None, None]
    assert ablate.read(file, study) == tested  # and so it stays


def test_trainings_of_another_kind_are_not_taken_up(study, sample, tmp_path):
    file = tmp_path / "width.json"
    ablate.run(study, [0], sample[0], None, file)
    before = file.read_bytes()
    other = studies.resolve(str(tmp_path / "width.toml"), SMALL | {"epochs": 1, "l2": 0.5})
    told = (
        r"width\.json has variant 'narrow' trained otherwise: --epochs is 1 here and 2 there; --l2 is 0.5 here and 0.0 "
    )
    with pytest.raises(ValueError, match=told + "there; name another file with --json, or remove that one"):
        ablate.run(other, [0], sample[0], None, file)
    content = json.loads(before)
    content["results"][0]["device"] = "cuda:0"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="training is on cpu here and was on cuda:0 there"):
        ablate.run(study, [0], sample[0], None, file)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "width.json: not JSON: .*; name another file with --json"),
        ("[]", "width.json: its format is None, want 'parityserve-ablation/1'; name another file with --json"),
        ('{"format": "parityserve-ablation/1", "study": "depth"}', "its study is 'depth', want 'width'; name another"),
        (
            '{"format": "parityserve-ablation/1", "study": "width", "dataset": "mnist"}',
            "its dataset is 'mnist', want 'fashion-mnist'",
        ),
        (
            '{"format": "parityserve-ablation/1", "study": "width", "dataset": "fashion-mnist", "results": [{}]}',
            "width.json: incomplete: .*missing.*; name another file with --json",
        ),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(study, sample, tmp_path, content, told):
    file = tmp_path / "width.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=told):
        ablate.run(study, [0], sample[0], None, file)
    assert file.read_text() == content


def test_a_variant_that_cannot_be_trained_on_these_images_is_known_before_any_is(sample, tmp_path):
    path = write(tmp_path, f"{STUDY}[variants.normed]\nbatch_norm = true\nbatch_size = 57\n")
    study = studies.resolve(path, SMALL)  # 400 images: the last batch has one
    file = tmp_path / "width.json"
    with pytest.raises(ValueError, match="variant 'normed': --batch-norm needs 2 images at least, and the last of 400"):
        ablate.run(study, [0], sample[0], None, file)
    assert not file.exists()


# What is made of the figures.


def test_the_rows_figures_are_those_of_the_trainings(study):
    accuracies = {"narrow": [0.90, 0.92, 0.91, 0.95], "wide": [0.93, 0.94, 0.95, 0.96]}
    results = [
        fake(name, seed, value, train_accuracy=value + 0.01, seconds=1.0 + seed)
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    first, second = ablate.compare(study, results)
    mean = sum(accuracies["wide"]) / 4
    assert second.validation.mean == pytest.approx(mean)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in accuracies["wide"]) / 3)
    assert second.validation.deviation == pytest.approx(deviation)
    assert second.train.mean == pytest.approx(mean + 0.01)
    assert (second.seconds.mean, second.seconds.deviation) == (2.5, pytest.approx(statistics.stdev([1, 2, 3, 4])))
    assert (first.difference, first.test, first.images_per_s) == (None, None, 10.0)
    differences = [0.03, 0.02, 0.04, 0.01]  # seed by seed
    assert second.difference.mean == pytest.approx(0.025)
    error = math.sqrt(sum((value - 0.025) ** 2 for value in differences) / 3) / math.sqrt(4)
    assert second.difference.standard_error == pytest.approx(error)
    assert second.difference.clear == (3.182 * error < 0.025)  # t at 0.975, 3 degrees of freedom


def test_a_difference_within_chance_is_not_clear():
    assert not ablate.difference([0.91, 0.93, 0.90], [0.90, 0.91, 0.91]).clear
    assert ablate.difference([0.92, 0.93, 0.925], [0.90, 0.911, 0.904]).clear
    assert not ablate.difference([0.92, 0.93], [0.90, 0.90]).clear  # two seeds prove little
    assert ablate.difference([0.99], [0.5]) == ablate.Difference(pytest.approx(0.49), None, clear=False)
    assert not ablate.difference([0.5] * 40, [0.5] * 40).clear


def test_students_t_is_what_it_says():
    """The quantile is where the density from there on holds 2.5 %."""
    for freedom in (1, 2, 7, 30):
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        quantile, steps = ablate._T95[freedom - 1], 20_000
        # From 0 to the quantile, by the midpoint rule.
        inside = sum((1 + ((i + 0.5) * quantile / steps) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps))
        assert scale * inside * quantile / steps == pytest.approx(0.475, abs=1e-4)


def test_the_markdown_table_has_the_rounded_figures(study):
    results = [fake("narrow", 0, 0.9), fake("narrow", 1, 0.92), fake("wide", 0, 0.91), fake("wide", 1, 0.92)]
    rows = ablate.compare(study, results)
    text = command._markdown(study, rows, command._notes(study, results, 2))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == [
        *("variant", "options", "parameters", "training", "validation"),
        *("difference", "clear", "seconds", "images/s"),
    ]
    assert lines[2] == ["narrow", "`--hidden 8`", "7", "100.00 ± 0.00", "91.00 ± 1.41", "", "", "2.0 ± 0.0", "10"]
    assert lines[3][4:7] == ["91.50 ± 0.71", "+0.50 ± 0.50", "no"]
    assert "How wide? All with `--channels 4 --pool 4 --device cpu" in text
    assert "fashion-mnist, seeds 0 to 1, on cpu." in text
    assert "validation of 200 images" in text
    single = [replace(result, test_accuracy=0.5) for result in results if result.seed == 0]
    rows, notes = ablate.compare(study, single), command._notes(study, single, 1)
    text = command._markdown(study, rows, notes)
    assert "| 90.00 |" in text
    assert "| +1.00 | no |" in text
    assert "| 50.00 |" in text
    assert "One seed says nothing about chance: compare with more --seeds." in text


def test_the_plot_shows_every_seed_the_mean_and_the_deviation():
    accuracies = [[0.90, 0.92, 0.94], [0.95, 0.95, 0.98]]
    figure = plots.comparison(["a", "a long name " * 5], accuracies, {"parameters": [10, 2000], "s": [1, 2]}, "Title")
    left, *others = figure.axes
    for row, values in enumerate(accuracies):
        assert list(left.lines[1 + row].get_xdata()) == values
    means, _, (bars,) = left.containers[0]
    assert list(means.get_xdata()) == pytest.approx([0.92, 0.96])
    ends = [[end[0] for end in segment] for segment in bars.get_segments()]
    assert ends[0] == pytest.approx([0.90, 0.94])
    assert [[bar.get_width() for bar in axes.patches] for axes in others] == [[10, 2000], [1, 2]]
    assert "\n" in left.get_yticklabels()[1].get_text()
    assert left.yaxis_inverted()
    assert plots.raster(figure).std() > 10


# The command.


def test_the_list_of_studies_and_of_variants(capsys):
    assert trainer.__main__.main(["ablate", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in studies.names())
    assert trainer.__main__.main(["ablate", "--list", "--study", "filters", "--dataset", MODEL]) == 0
    listed = capsys.readouterr().out
    assert "filters, fashion-mnist: How many filters" in listed
    assert "243,786" in listed


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "--study: want one of augmentation, batch-sizes, "),
        (["--study", "nothing"], "--study: got 'nothing', want one of augmentation, "),
        (["--study", "networks", "--network", "mlp"], "--network would change nothing: every variant of networks sets"),
        (["--study", "filters", "--list", "--epochs", "0"], "--epochs: Input should be greater than or equal to 1"),
        (["--study", "filters", "--plot", "a.pdf"], "--plot: got 'a.pdf', want the name of a .png file"),
    ],
)
def test_wrong_commands_are_refused(words, told, capsys):
    assert trainer.__main__.main(["ablate", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_number_of_seeds_that_is_none(capsys):
    with pytest.raises(SystemExit):
        trainer.__main__.parser().parse_args(["ablate", "--seeds", "0"])
    assert "argument --seeds: got '0', want a number from 1 to 100" in capsys.readouterr().err


def test_torchrun_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trainer.__main__.main(["ablate", "--study", "filters"]) == 2
    assert "ablate trains in one process: start it without torchrun" in capsys.readouterr().err


@pytest.mark.data
def test_the_command_trains_keeps_tells_and_draws(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_test", lambda *_: pytest.fail("the test set was read without --test"))
    words = ["ablate", "--study", write(tmp_path, STUDY), "--dataset", MODEL, "--seeds", "2", "--device", "cpu"]
    small = ["--train-images", "200", "--validation-images", "300", "--epochs", "1"]
    written = ["--json", str(tmp_path / "w.json"), "--markdown", str(tmp_path / "docs" / "w.md")]
    assert trainer.__main__.main([*words, *small, *written]) == 0
    told = capsys.readouterr().out
    assert "4 of 4: wide, seed 1: validation accuracy " in told
    assert "--hidden 32 --dropout 0.2" in told  # whole, though the output is narrow
    assert (tmp_path / "docs" / "w.md").read_text().startswith("How wide? All with `--channels 4 --pool 4")
    with Image.open(tmp_path / "w.png") as picture:
        assert picture.format == "PNG"
    more = ["--plot", str(tmp_path / "other.png"), "--seeds", "3"]
    assert trainer.__main__.main([*words, *small, *written, *more]) == 0
    told = capsys.readouterr().out
    assert f"4 of 6 trainings are in {tmp_path / 'w.json'} already" in told
    assert told.count("validation accuracy") == 2
    assert (tmp_path / "other.png").exists()


def test_without_matplotlib_there_is_a_table_and_a_word(study, capsys, monkeypatch, tmp_path):
    rows = ablate.compare(study, [fake("narrow", 0, 0.9), fake("wide", 0, 0.91)])
    monkeypatch.delitem(sys.modules, "trainer.plots")
    monkeypatch.delitem(sys.modules, "trainer.pictures", raising=False)
    monkeypatch.delattr(trainer, "plots")
    monkeypatch.delattr(trainer, "pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    command._draw(study, rows, tmp_path / "w.png", 1)
    told = capsys.readouterr().out
    assert "no plot was drawn: pictures need matplotlib" in told
    assert told.endswith(": pip install 'parityserve[plots]'\n")
    assert not (tmp_path / "w.png").exists()


@pytest.mark.data
def test_ctrl_c_says_what_is_kept(data_dir, tmp_path):
    words = ["--study", write(tmp_path, STUDY), "--seeds", "100", "--device", "cpu", "--json", tmp_path / "w.json"]
    words += ["--train-images", "200", "--validation-images", "100", "--epochs", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "ablate", *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("2 of 200"):
                process.send_signal(signal.SIGINT)
                break
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, told
    kept = len(json.loads((tmp_path / "w.json").read_text())["results"])
    # The signal may come between the file and the word of it.
    said = int(
        re.fullmatch(r"stopped; .*w\.json has (\d+) of 200 trainings; the same command does the rest\n", told)[1]
    )
    assert 2 <= said <= kept <= said + 1
