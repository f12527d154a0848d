import pytest
import torch

from trainer.config import PRESETS, NetworkConfig
from trainer.models import Deployed, MaxPool2d, Network, count_parameters
from trainer.train import build

# Between them they use every option of the form with each of its choices.
FORMS = [
    {"network": "cnn"},
    {"network": "convnet"},
    {"network": "mlp", "batch_norm": True, "dropout": 0.3, "activation": "leaky-relu"},
    {"channels": (16, 32, 64), "padding": "same", "activation": "tanh"},
    {"channels": (8,), "kernel_size": 5, "pool": 3, "hidden": (), "activation": "gelu"},
    {"channels": (4, 8), "convs": 2, "pool": 1, "hidden": (20, 30), "activation": "elu"},
    {"channels": (), "hidden": ()},
    {
        "channels": (8, 16),
        "convs": 2,
        "padding": "same",
        "batch_norm": True,
        "global_pool": True,
        "dropout": 0.2,
        "activation": "silu",
    },
]


def images(n, seed=0):
    return torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def used(form):
    """A network of this form whose statistics of batch normalisation are not those that it begins with."""
    network = build(NetworkConfig(**form), 0, mean=72.9, std=90.0)
    network.train()
    with torch.no_grad():
        for seed in range(3):
            network(images(16, seed))
    return network.eval()


@pytest.mark.parametrize(("name", "parameters"), [("cnn", 225_034), ("convnet", 113_386), ("mlp", 59_850)])
def test_the_presets_have_their_number_of_parameters(name, parameters):
    config = NetworkConfig(network=name)
    assert count_parameters(Network(config)) == parameters
    assert config.name == name


def test_every_preset_is_counted_above():
    assert sorted(PRESETS) == ["cnn", "convnet", "mlp"]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_raw_pixels_in_logits_out(form):
    logits = used(form)(images(3))
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32


def test_the_form_decides_the_layers():
    network = Network(NetworkConfig(channels=(4, 8), convs=2, batch_norm=True, dropout=0.5, hidden=(20,)))
    assert [type(layer).__name__ for layer in network.features] == [
        *["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"] * 2
    ]
    assert [type(layer).__name__ for layer in network.classifier] == [
        *["Flatten", "Dropout", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    ]
    assert {layer.p for layer in network.modules() if isinstance(layer, torch.nn.Dropout)} == {0.5}


@pytest.mark.parametrize(
    ("form", "features"),
    [
        ({"channels": (6,)}, (6, 13, 13)),
        ({"channels": (6, 7)}, (7, 5, 5)),
        ({"channels": (6,), "convs": 3}, (6, 11, 11)),
        ({"channels": (6,), "kernel_size": 7}, (6, 11, 11)),
        ({"channels": (6,), "padding": "same"}, (6, 14, 14)),
        ({"channels": (6,), "padding": "same", "kernel_size": 5, "convs": 2}, (6, 14, 14)),
        ({"channels": (6,), "pool": 4}, (6, 6, 6)),
        ({"channels": (6,), "pool": 1}, (6, 26, 26)),
        ({"channels": (6,), "global_pool": True}, (6, 1, 1)),
        ({"network": "mlp"}, (1, 28, 28)),
    ],
    ids=str,
)
def test_the_form_decides_the_shape_of_the_features(form, features):
    network = Network(NetworkConfig(**form))
    assert network.features(images(2).float()).shape[1:] == features


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("pixels", [(8, 8), (11, 7)])
def test_pooling_gives_the_maxima_with_and_without_a_gradient(size, pixels):
    features = torch.randn(2, 3, *pixels, generator=torch.Generator().manual_seed(0))
    pool = MaxPool2d(size).train()
    want = torch.nn.functional.max_pool2d(features, size)
    assert torch.equal(pool(features), want)
    assert torch.equal(pool(features.clone().requires_grad_()), want)
    assert torch.equal(pool.eval()(features), want)


def test_the_activation_is_the_one_asked_for():
    names = ("relu", "leaky-relu", "elu", "gelu", "silu", "tanh")
    kinds = [Network(NetworkConfig(channels=(2,), activation=name)).features[-1] for name in names]
    assert [type(kind).__name__ for kind in kinds] == ["ReLU", "LeakyReLU", "ELU", "GELU", "SiLU", "Tanh"]


def test_dropout_never_drops_a_pixel():
    layers = Network(NetworkConfig(network="mlp", dropout=0.5)).classifier
    assert [type(layer).__name__ for layer in layers][:3] == ["Flatten", "Linear", "ReLU"]


def test_dropout_acts_in_training_alone():
    network = build(NetworkConfig(dropout=0.5))
    network.train()
    assert not torch.equal(network(images(4)), network(images(4)))
    network.eval()
    assert torch.equal(network(images(4)), network(images(4)))


def test_batch_norm_normalises():
    """In training each channel before the activation has mean 0 and deviation 1 over the batch."""
    network = build(NetworkConfig(batch_norm=True))
    network.train()
    out = network.features[:2](images(50).float())
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(32), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(32), atol=1e-2, rtol=0)


def test_pooling_before_a_monotonic_activation_is_the_same():
    network = build(mean=72.9, std=90.0)
    layers = list(network.features)
    swapped = torch.nn.Sequential(*[layers[i] for i in (0, 2, 1, 3, 5, 4)])
    pixels = (images(8).float() - 72.9) / 90.0
    assert torch.equal(swapped(pixels), network.features(pixels))


def test_normalisation_is_inside():
    """The network sees (pixel - mean) / std: the same numbers given ready-made must give the same logits."""
    image = torch.arange(784, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(1, 1, 28, 28)
    network = build(seed=0, mean=72.9, std=90.0)
    normalised = (image.float() - 72.9) / 90.0
    want = network.classifier(network.features(normalised))
    assert torch.equal(network(image), want)
    assert not torch.equal(build(seed=0, mean=33.3, std=78.6)(image), want)


def test_normalisation_is_saved_with_the_weights():
    saved = build(seed=0, mean=72.9, std=90.0).state_dict()
    restored = Network()
    restored.load_state_dict(saved)
    assert (restored.mean.item(), restored.std.item()) == (torch.tensor(72.9).item(), 90.0)


def test_deployed_gives_logits_and_their_softmax():
    network = build()
    image = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits, probabilities = Deployed(network)(image)
    assert torch.equal(logits, network(image))
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


def test_the_seed_alone_decides_the_initial_weights():
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, same, other = build(seed=7), build(seed=7), build(seed=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
