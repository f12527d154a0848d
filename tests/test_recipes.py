"""Where the options of training come from, and what is said of those that are wrong."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import MODEL
from torch.nn import functional

import trainer.__main__
from serving import option_table
from trainer import runs, sources, train
from trainer.checkpoint import Checkpoint
from trainer.config import NetworkConfig, TrainConfig
from trainer.data import DATASETS
from trainer.export import export
from trainer.models import Network, count_parameters
from trainer.sources import resolve

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "training.md"


def test_options_come_before_the_file_before_the_recipe_before_defaults(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("epochs = 7\nbatch_size = 32\nchannels = [8, 16]\n")
    config = resolve({"epochs": "9"}, "course-mnist", file)
    assert (config.epochs, config.batch_size, config.optimiser, config.ema) == (9, 32, "adam", 0.0)
    assert (config.channels, config.hidden) == ((8, 16), (128,))


def test_the_defaults_follow_from_other_options():
    config = resolve({"network": "mlp", "optimiser": "sgd", "dataset": "fashion-mnist", "early_stopping": 2})
    assert (config.channels, config.hidden) == ((), (64, 128))
    assert (config.learning_rate, config.momentum, config.weight_decay) == (0.1, 0.9, 0.0)
    assert (config.epochs, config.keep) == (10, "best")
    assert resolve({"schedule": "cosine"}).warm_up == 0
    assert resolve({}).warm_up == 0.25


@pytest.mark.parametrize("name", sources.recipes())
def test_every_recipe_is_accepted_and_builds_its_network(name):
    config = resolve({}, name)
    assert config == resolve(config.model_dump(mode="json"))  # as saved, it is the same again
    parameters = count_parameters(Network(config))
    assert not name.startswith("best") or parameters <= 300_000


def test_the_recipes_of_the_courses():
    mnist, fashion = resolve({}, "course-mnist"), resolve({}, "course-fashion")
    for config in (mnist, fashion):
        assert (config.optimiser, config.schedule, config.normalise) == ("adam", "constant", "unit")
        assert (config.validation_images, config.weight_decay, config.precision) == (0, 0, "fp32")
    assert (mnist.name, mnist.epochs, mnist.batch_size, mnist.learning_rate) == ("cnn", 5, 64, 1e-3)
    assert (fashion.name, fashion.epochs, fashion.batch_size, fashion.learning_rate) == ("convnet", 8, 256, 1e-4)
    assert (mnist.shuffle, fashion.shuffle) == (True, False)


def test_a_courses_recipe_does_what_a_plain_loop_does(sample):
    """torch's own Adam on pixels from 0 to 1, batch after batch in the files' order."""
    config = resolve({"epochs": 2, "batch_size": 64, "device": "cpu"}, "course-fashion")
    network = train.build(config, 0, **runs.pixel_statistics(config, DATASETS[MODEL]))
    layers = train.build(config, 0)
    plain = torch.nn.Sequential(*layers.features, *layers.classifier)
    optimiser = torch.optim.Adam(plain.parameters(), lr=1e-4)
    images, labels = sample[0].images[:200] / 255, sample[0].labels[:200]
    for _ in range(2):
        for start in range(0, 200, 64):
            loss = functional.cross_entropy(plain(images[start : start + 64]), labels[start : start + 64])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    list(train.fit(network, sample[0].take(torch.arange(200)), None, config))
    for got, want in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_a_manifest_repeats_its_training(sample, tmp_path):
    """The exported version alone is enough to get the same weights again, bit for bit."""
    config = resolve(
        {
            "dataset": MODEL,
            "channels": "4",
            "hidden": "16",
            "epochs": 2,
            "validation_images": 100,
            "device": "cpu",
            "shift": 1,
            "ema": 0.9,
            "seed": 4,
        }
    )
    first = runs.run(config, sample, runs.Files(tmp_path / "net.pt"))
    bundle, _ = export(first, sample[1], tmp_path / "exported")
    again = resolve({}, file=bundle.path / "manifest.json")
    assert again == config
    second = runs.run(again, sample, runs.Files(tmp_path / "again.pt"))
    assert all(torch.equal(second.weights[name], tensor) for name, tensor in first.weights.items())


def test_a_checkpoint_rebuilds_its_network_from_its_options():
    config = TrainConfig(channels=(3, 5), convs=2, batch_norm=True, hidden=())
    checkpoint = Checkpoint(json.loads(config.model_dump_json()), Network(config).state_dict(), [])
    assert checkpoint.build().config == config.form
    assert checkpoint.config.name == "custom"


def test_versions_from_before_networks_had_options_are_the_cnn():
    old = {
        "dataset": "mnist",
        "epochs": 3,
        "batch_size": 128,
        "learning_rate": 0.004,
        "warm_up": 0.25,
        "seed": 0,
        "weight_decay": 0.01,
        "validation_images": 5000,
        "device": "auto",
    }
    assert resolve(old).form == NetworkConfig(network="cnn")


# --- what is wrong, and what is said of it


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"optimiser": "lion"}, "--optimiser: Input should be 'sgd', 'rmsprop', 'adam' or 'adamw', got 'lion'"),
        ({"schedule": "linear"}, "'constant', 'step', 'plateau', 'cosine' or 'onecycle', got 'linear'"),
        ({"init": "orthogonal"}, "--init: Input should be 'default', 'xavier-uniform',"),
        ({"network": "resnet"}, "--network: Input should be 'cnn', 'convnet' or 'mlp', got 'resnet'"),
        ({"activation": "maxout"}, "--activation: Input should be 'relu', 'leaky-relu', 'elu', 'gelu', 'silu' or"),
        ({"precision": "int8"}, "--precision: Input should be 'fp32', 'bf16' or 'fp16', got 'int8'"),
        ({"normalise": "none"}, "--normalise: Input should be 'standard' or 'unit', got 'none'"),
        ({"padding": "valid"}, "--padding: Input should be 'none' or 'same', got 'valid'"),
        ({"keep": "first"}, "--keep: Input should be 'last' or 'best', got 'first'"),
        ({"kernel_size": 4}, "--kernel-size: Input should be 1, 3, 5 or 7, got 4"),
        ({"channels": "16,0"}, "--channels: want sizes of at least 1, as in 16,32, or none, got '16,0'"),
        ({"hidden": "many"}, "--hidden: Input should be a valid integer"),
        ({"hidden": "3,a,b"}, "got 'a'; --hidden: Input should be a valid integer"),
        ({"dropout": 1.0}, "--dropout: Input should be less than 1, got 1.0"),
        ({"batch_size": 0}, "--batch-size: Input should be greater than or equal to 1, got 0"),
        ({"ema": 1.0}, "--ema: Input should be less than 1, got 1.0"),
        ({"label_smoothing": -0.1}, "--label-smoothing: Input should be greater than or equal to 0, got -0.1"),
        ({"momentum": 0.9}, "--momentum is for --optimiser sgd or rmsprop, which is adamw here"),
        ({"nesterov": True}, "--nesterov is for --optimiser sgd, which is adamw here"),
        ({"optimiser": "sgd", "momentum": 0, "nesterov": True}, "--nesterov needs a --momentum above 0"),
        ({"network": "mlp", "stem": "frozen"}, "--stem has nothing to act on where --channels are none"),
        (
            {"hardest": 0.5, "batch_norm": True},
            "--hardest would give --batch-norm the statistics of the hardest images alone",
        ),
        ({"alpha": 0.9}, "--alpha is for --optimiser rmsprop, which is adamw here"),
        ({"centered": True}, "--centered is for --optimiser rmsprop, which is adamw here"),
        ({"optimiser": "sgd", "beta1": 0.8}, "--beta1 is for --optimiser adam or adamw, which is sgd here"),
        ({"optimiser": "sgd", "beta2": 0.8}, "--beta2 is for --optimiser adam or adamw, which is sgd here"),
        ({"optimiser": "sgd", "eps": 0.1}, "--eps is for --optimiser rmsprop or adam or adamw, which is sgd here"),
        ({"schedule": "constant", "warm_up": 0.1}, "--warm-up is for --schedule onecycle or cosine, which is constant"),
        ({"step_epochs": 3}, "--step-epochs is for --schedule step, which is onecycle here"),
        ({"decay": 0.5}, "--decay is for --schedule step or plateau, which is onecycle here"),
        ({"patience": 5}, "--patience is for --schedule plateau, which is onecycle here"),
        ({"flip": True}, "--flip is for --dataset fashion-mnist, which is mnist here"),
        ({"validation_images": 0, "schedule": "plateau"}, "--schedule plateau looks at validation images, and"),
        (
            {"validation_images": 0, "keep": "best"},
            "--keep best looks at validation images, and --validation-images is 0",
        ),
        (
            {"validation_images": 0, "early_stopping": 2, "keep": "last"},
            "--early-stopping looks at validation images, and --validation-images is 0",
        ),
        (
            {"channels": "8,8,8,8"},
            "--channels: 4 blocks of 1 3 x 3 convolutions with pooling by 2 leave nothing of 28 x 28 pixels; "
            "want fewer blocks, --padding same or a smaller --pool",
        ),
        ({"network": "mlp", "global_pool": True}, "--global-pool has nothing to act on where --channels are none"),
        ({"network": "mlp", "kernel_size": 5}, "--kernel-size has nothing to act on where --channels are none"),
        (
            {"channels": "none", "hidden": "none", "dropout": 0.5},
            "--dropout has nothing to act on where",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_option_says_what_is_accepted(options, problem):
    with pytest.raises(ValueError, match=re.escape(problem)) as raised:
        resolve(options)
    assert "factory" not in str(raised.value)


def test_several_wrong_options_are_all_named():
    with pytest.raises(ValueError, match=r"--dropout: .*; --epochs: ") as raised:
        resolve({"dropout": 2, "epochs": 0})
    assert str(raised.value).count(";") == 1


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("my.toml", "epoch = 3", "my.toml: no such setting: epoch (did you mean epochs or step_epochs?); --help"),
        ("my.toml", "epochs 3", "my.toml: not TOML: "),
        ("my.toml", "epochs = 0", "my.toml: epochs: Input should be greater than or equal to 1, got 0"),
        ("my.json", "{", "my.json: not JSON: "),
        ("my.json", "[]", "my.json: not the manifest of an exported version: it has no training options"),
        ("my.json", '{"model": "m"}', "my.json: not the manifest of an exported version: it has no training options"),
        ("my.json", '{"training": {"wings": 2}}', "my.json: no such setting: wings; --help lists them all"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, name, content, problem):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(problem)):
        resolve({}, file=tmp_path / name)


def test_a_recipe_that_is_none():
    names = "best-fashion, best-mnist, course-fashion, course-mnist, fast"
    with pytest.raises(ValueError, match=f"--recipe: got 'slow', want one of {names}"):
        resolve({}, "slow")


def test_a_recipes_value_is_named_by_its_recipe(tmp_path, monkeypatch):
    (tmp_path / "odd.toml").write_text("epochs = 0")
    monkeypatch.setattr(sources, "RECIPES", tmp_path)
    with pytest.raises(ValueError, match="recipe odd: epochs: Input should be greater than or equal to 1, got 0"):
        resolve({}, "odd")


# --- docs/training.md


def test_the_table_of_options_is_current(tmp_path):
    made = tmp_path / "training.md"
    made.write_text(PAGE.read_text())
    option_table.write(made, TrainConfig)
    assert made.read_text() == PAGE.read_text(), "docs/training.md is stale: make docs"
    for name in TrainConfig.model_fields:
        assert f"| `{name}` |" in made.read_text()


def test_the_pages_commands_are_accepted_and_its_recipes_exist():
    text = PAGE.read_text()
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = [line for line in blocks.splitlines() if " -m trainer " in line]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line.partition(" -m trainer ")[2], comments=True)
        trainer.__main__.parser().parse_args(words)  # exits, which fails the test, when it is not accepted
    for name in sources.recipes():
        assert f"| `{name}` |" in text


def test_summary_lists_the_layers(capsys):
    assert trainer.__main__.main(["summary", "--network", "convnet"]) == 0
    table = capsys.readouterr().out
    assert "network: convnet" in table
    assert re.search(r"Conv2d \(3\).*\[1, 32, 11, 11\]\s+9,248\s+\[3, 3\]\s+1,119,008", table)  # 9,248 x 11 x 11
    assert re.search(r"Linear \(1\).*\[1, 128\]\s+102,528", table)
    assert "Total params: 113,386" in table
    assert "Total mult-adds (M): 1.44" in table
    assert trainer.__main__.main(["summary", "--channels", "8,16", "--hidden", "none", "--kernel-size", "5"]) == 0
    assert "network: custom" in capsys.readouterr().out
