"""Optimisers, schedules, initial weights and penalties against their formulas."""

import math

import pytest
import torch
from torch import nn

from trainer import optim
from trainer.config import NetworkConfig, TrainConfig
from trainer.train import build

CPU = torch.device("cpu")
GRADIENTS = (0.5, -1.5, 2.0, 0.25)
START = 3.0


def steps(**options):
    """Where one weight goes from START under GRADIENTS."""
    config = TrainConfig(schedule="constant", **options)
    weight = nn.Parameter(torch.tensor([START]))
    optimiser = optim.make_optimiser([weight], config, CPU)
    places = []
    for gradient in GRADIENTS:
        weight.grad = torch.tensor([gradient])
        optimiser.step()
        places.append(weight.item())
    return places


@pytest.mark.parametrize(
    ("momentum", "decay", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.5, 0.1, False), (0.9, 0.0, True), (0.5, 0.1, True)],
)
def test_sgd(momentum, decay, nesterov):
    got = steps(optimiser="sgd", learning_rate=0.1, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    weight, velocity, want = START, 0.0, []
    for gradient in GRADIENTS:
        gradient += decay * weight
        velocity = momentum * velocity + gradient
        weight -= 0.1 * (gradient + momentum * velocity if nesterov else velocity)
        want.append(weight)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("alpha", "momentum", "eps", "decay"), [(0.9, 0.0, 1e-8, 0.0), (0.5, 0.7, 0.1, 0.2)])
def test_rmsprop(alpha, momentum, eps, decay, centered):
    options = {"alpha": alpha, "momentum": momentum, "eps": eps, "centered": centered, "weight_decay": decay}
    got = steps(optimiser="rmsprop", learning_rate=0.01, **options)
    weight, square, mean, velocity, want = START, 0.0, 0.0, 0.0, []
    for gradient in GRADIENTS:
        gradient += decay * weight
        square = alpha * square + (1 - alpha) * gradient**2
        mean = alpha * mean + (1 - alpha) * gradient
        velocity = momentum * velocity + gradient / (math.sqrt(square - mean**2 if centered else square) + eps)
        weight -= 0.01 * velocity
        want.append(weight)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
@pytest.mark.parametrize(("beta1", "beta2", "eps", "decay"), [(0.9, 0.999, 1e-8, 0.0), (0.7, 0.9, 0.1, 0.2)])
def test_adam_and_adamw(optimiser, beta1, beta2, eps, decay):
    """They differ in weight decay alone: a part of the gradient, or of the weight."""
    got = steps(optimiser=optimiser, learning_rate=0.01, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)
    weight, first, second, want = START, 0.0, 0.0, []
    for step, gradient in enumerate(GRADIENTS, 1):
        if optimiser == "adamw":
            weight -= 0.01 * decay * weight
        else:
            gradient += decay * weight
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        weight -= 0.01 * (first / (1 - beta1**step)) / (math.sqrt(second / (1 - beta2**step)) + eps)
        want.append(weight)
    assert got == pytest.approx(want, rel=1e-5)


def test_optimisers_are_fused_where_torch_can():
    for name in ("sgd", "adam", "adamw"):
        optimiser = optim.make_optimiser([nn.Parameter(torch.ones(1))], TrainConfig(optimiser=name), CPU)
        assert optimiser.defaults["fused"] is True


def rates(losses=None, **options):
    """The learning rate of every step of four epochs of five steps."""
    config = TrainConfig(learning_rate=0.5, epochs=4, optimiser="sgd", **options)
    optimiser = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=config.learning_rate)
    schedule = optim.Schedule(optimiser, config, steps_per_epoch=5)
    seen = []
    for epoch in range(4):
        for step in range(5):
            schedule.before_step(epoch * 5 + step)
            seen.append(schedule.learning_rate)
        schedule.after_epoch(losses[epoch] if losses else None)
    return seen


def torchs(make, per_epoch=False):
    """The same from one of torch's own schedules."""
    optimiser = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = make(optimiser)
    seen = []
    for step in range(20):
        seen.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if not per_epoch or step % 5 == 4:
            schedule.step()
    return seen


def test_constant():
    assert rates(schedule="constant") == [0.5] * 20


def test_step():
    got = rates(schedule="step", step_epochs=2, decay=0.1)
    assert got == pytest.approx([0.5] * 10 + [0.05] * 10)
    assert got == pytest.approx(torchs(lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.1), per_epoch=True))


def test_cosine():
    got = rates(schedule="cosine")
    assert got == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])
    assert got == pytest.approx(torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)))


def test_cosine_with_a_warm_up():
    got = rates(schedule="cosine", warm_up=0.25)
    assert got[0] == pytest.approx(0.5 / 25)
    assert got[4] == pytest.approx(0.5)
    assert got[:5] == pytest.approx([0.02 + 0.48 * step / 4 for step in range(5)])
    assert got[5:] == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 16)) for step in range(1, 16)])


@pytest.mark.parametrize("warm_up", [0.25, 0.5, 0.3])
def test_onecycle(warm_up):
    got = rates(schedule="onecycle", warm_up=warm_up)
    assert max(got) <= 0.5
    assert got[0] == pytest.approx(0.5 / 25)
    want = torchs(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.5, total_steps=20, pct_start=warm_up, anneal_strategy="linear", cycle_momentum=False
        )
    )
    assert got == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(1, 1), (1, 2), (2, 1), (3, 1)])
def test_the_shortest_cycles_stay_between_the_bounds(epochs, steps_per_epoch):
    for warm_up in (0.0, 0.25, 0.5, 0.99):
        for schedule in ("onecycle", "cosine"):
            config = TrainConfig(schedule=schedule, warm_up=warm_up, epochs=epochs)
            factors = [optim.rate_factor(config, step, steps_per_epoch) for step in range(epochs * steps_per_epoch)]
            assert all(0 < factor <= 1 for factor in factors)


def test_plateau_reduces_after_its_patience():
    losses = [1.0, 1.0, 1.0, 0.5]
    got = rates(losses, schedule="plateau", patience=1, decay=0.2)
    assert got == pytest.approx([0.5] * 15 + [0.1] * 5)  # two epochs without a smaller loss
    assert rates([1.0, 0.9, 0.8, 0.7], schedule="plateau", patience=0) == [0.5] * 20


def test_plateau_goes_on_where_it_was():
    config = TrainConfig(schedule="plateau", patience=1, optimiser="sgd", learning_rate=0.5)
    optimiser = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    first = optim.Schedule(optimiser, config, 5)
    first.after_epoch(1.0)
    first.after_epoch(1.0)
    second = optim.Schedule(optimiser, config, 5)
    second.load_state_dict(first.state_dict())
    second.after_epoch(1.0)
    assert second.learning_rate == pytest.approx(0.05)


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
@pytest.mark.parametrize("scheme", ["xavier", "kaiming", "lecun"])
def test_initial_weights_have_their_variance(scheme, distribution):
    """fan_in and fan_out are those of https://pytorch.org/docs/stable/nn.init.html."""
    network = build(NetworkConfig(), 0, init=f"{scheme}-{distribution}")
    layers = {"features.3": (32 * 9, 64 * 9), "classifier.1": (1600, 128)}
    for name, (fan_in, fan_out) in layers.items():
        layer = network.get_submodule(name)
        variance = {"xavier": 2 / (fan_in + fan_out), "kaiming": 2 / fan_in, "lecun": 1 / fan_in}[scheme]
        assert layer.weight.var().item() == pytest.approx(variance, rel=0.05)
        assert layer.weight.mean().item() == pytest.approx(0, abs=0.1 * math.sqrt(variance))
        bounded = layer.weight.abs().max().item() <= math.sqrt(3 * variance)
        assert bounded == (distribution == "uniform")
        assert layer.bias.count_nonzero() == 0


def test_the_same_as_torchs_own_initialisation():
    """Xavier and Kaiming are those of torch.nn.init, drawn from the same numbers."""
    for name in ("xavier-uniform", "xavier-normal", "kaiming-uniform", "kaiming-normal"):
        layer = nn.Sequential(nn.Conv2d(3, 8, 5))
        torch.manual_seed(0)
        optim.initialise(layer, name)
        scheme, distribution = name.split("-")
        arguments = {"nonlinearity": "relu"} if scheme == "kaiming" else {}
        want = torch.empty_like(layer[0].weight)
        torch.manual_seed(0)
        getattr(nn.init, f"{scheme}_{distribution}_")(want, **arguments)
        torch.testing.assert_close(layer[0].weight.detach(), want)


def test_default_initial_weights_are_torchs():
    torch.manual_seed(0)
    layer = nn.Linear(10, 5)
    before = layer.weight.clone()
    optim.initialise(layer, "default")
    assert torch.equal(layer.weight, before)
    assert layer.bias.count_nonzero() > 0


def test_the_penalty_is_elastic_net():
    weights = [torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0]])]
    assert optim.penalty(weights, 0.1, 0.0).item() == pytest.approx(0.1 * 6)
    assert optim.penalty(weights, 0.0, 0.01).item() == pytest.approx(0.01 * 14)
    assert optim.penalty(weights, 0.1, 0.01).item() == pytest.approx(0.6 + 0.14)


def test_biases_and_scales_are_not_penalised():
    network = build(NetworkConfig(channels=(4,), batch_norm=True))
    assert [tuple(weight.shape) for weight in optim.penalised(network)] == [(4, 1, 3, 3), (128, 676), (10, 128)]
