import torch

from trainer.models import NETWORKS, Cnn, Deployed, count_parameters
from trainer.train import build


def test_the_cnn_has_225034_parameters():
    assert count_parameters(Cnn()) == 225_034


def test_raw_pixels_in_logits_out():
    logits = Cnn()(torch.zeros(3, 1, 28, 28, dtype=torch.uint8))
    assert logits.shape == (3, 10)
    assert logits.dtype == torch.float32


def test_normalisation_is_inside():
    """The network sees (pixel - mean) / std: the same numbers given ready-made must give the same logits."""
    image = torch.arange(784, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(1, 1, 28, 28)
    network = build(Cnn, 0, mean=72.9, std=90.0)
    normalised = (image.float() - 72.9) / 90.0
    want = network.classifier(network.features(normalised))
    assert torch.equal(network(image), want)
    assert not torch.equal(build(Cnn, 0, mean=33.3, std=78.6)(image), want)


def test_normalisation_is_saved_with_the_weights():
    saved = build(Cnn, 0, mean=72.9, std=90.0).state_dict()
    restored = Cnn()
    restored.load_state_dict(saved)
    assert (restored.mean.item(), restored.std.item()) == (torch.tensor(72.9).item(), 90.0)


def test_deployed_gives_logits_and_their_softmax():
    network = build(NETWORKS["cnn"], 0)
    image = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits, probabilities = Deployed(network)(image)
    assert torch.equal(logits, network(image))
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))


def test_the_seed_alone_decides_the_initial_weights():
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one, same, other = build(Cnn, 7), build(Cnn, 7), build(Cnn, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
