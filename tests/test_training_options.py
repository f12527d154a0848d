"""What each option of training does to a training; see test_optim, test_augment and test_models for the parts."""

import copy
import functools
import math
import os

import pytest
import torch
from torch.nn import functional

from serving.memory import glibc
from trainer import devices, memory, runs, train
from trainer.config import TrainConfig
from trainer.data import DATASETS, Split
from trainer.processes import ALONE, Processes
from trainer.train import Training, build

PIXELS = {"mean": 72.9, "std": 90.0}
# One small step size after the other on plain gradients, which a test can repeat by hand.
PLAIN = {"optimiser": "sgd", "momentum": 0, "schedule": "constant", "learning_rate": 0.05, "channels_last": False}
SMALL = {"channels": (4,), "hidden": (16,), "pool": 4}


def options(**changes):
    return TrainConfig(
        **{
            "dataset": "fashion-mnist",
            "epochs": 1,
            "flip": False,
            "label_smoothing": 0.0,
            "batch_size": 50,
            "validation_images": 100,
            **SMALL,
            **changes,
        }
    )


def trained(sample, config, images=200, on_step=lambda network: None):
    """A network trained on the first images of the sample, and its training."""
    network = build(config, config.seed, init=config.init, **PIXELS)
    fitting, validation = runs.divide(sample[0], config)
    fitting = fitting.take(torch.arange(images))
    training = Training(network, fitting, validation, config, lambda _: on_step(network))
    for _ in training.epochs():
        pass
    network.load_state_dict(training.result())
    return network, training


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def by_hand(sample, config, order, change_loss=lambda network, loss: loss, images=200):
    """Plain gradient descent as one writes it down: for each batch, weight -= rate * gradient."""
    network = build(config, config.seed, **PIXELS)
    fitting, _ = runs.divide(sample[0], config)
    for indices in order(images):
        loss = functional.cross_entropy(network(fitting.images[indices]), fitting.labels[indices])
        network.zero_grad()
        change_loss(network, loss).backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= config.learning_rate * parameter.grad
    return network


def in_order(size):
    return lambda images: torch.arange(images).split(size)


@pytest.mark.parametrize("size", [1, 30, 200])
def test_batch_size_from_one_to_the_full_set(sample, size):
    config = options(**PLAIN, batch_size=size, shuffle=False)
    steps = []
    network, _ = trained(sample, config, on_step=steps.append)
    assert len(steps) == math.ceil(200 / size)
    torch.testing.assert_close(weights(network), weights(by_hand(sample, config, in_order(size))), atol=1e-5, rtol=1e-3)


def test_a_batch_size_beyond_the_set_is_the_full_set(sample):
    config = options(**PLAIN, batch_size=60_000, shuffle=False)
    assert torch.equal(
        weights(trained(sample, config)[0]),
        weights(trained(sample, config.model_copy(update={"batch_size": 200}))[0]),
    )


def test_shuffle_gives_another_order_in_each_epoch(sample):
    """The orders are those of a generator with the training's seed."""
    config = options(**PLAIN, epochs=2, batch_size=50, seed=3)
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(200, generator=generator) for _ in range(2)]
    assert not torch.equal(*orders)
    want = by_hand(sample, config, lambda _: [*orders[0].split(50), *orders[1].split(50)])
    got = weights(trained(sample, config)[0])
    torch.testing.assert_close(got, weights(want), atol=1e-5, rtol=1e-3)
    ordered = weights(trained(sample, config.model_copy(update={"shuffle": False}))[0])
    assert (ordered - got).abs().max() > 1e-4


def test_l1_and_l2_are_added_to_the_loss(sample):
    config = options(**PLAIN, shuffle=False, l1=1e-3, l2=1e-2)

    def penalised(network, loss):
        kernels = [parameter for parameter in network.parameters() if parameter.dim() > 1]
        return loss + 1e-3 * sum(k.abs().sum() for k in kernels) + 1e-2 * sum(k.pow(2).sum() for k in kernels)

    want = by_hand(sample, config, in_order(50), penalised)
    torch.testing.assert_close(weights(trained(sample, config)[0]), weights(want), atol=1e-5, rtol=1e-3)


def test_l1_leaves_more_weights_near_zero_and_l2_smaller_ones(sample):
    norms, zeros = {}, {}
    for name, change in {"none": {}, "l1": {"l1": 1e-2}, "l2": {"l2": 1e-2}}.items():
        config = options(epochs=8, optimiser="adam", learning_rate=3e-3, schedule="constant", **change)
        kernels = torch.cat([p.detach().flatten() for p in trained(sample, config)[0].parameters() if p.dim() > 1])
        norms[name] = kernels.abs().sum().item(), kernels.square().sum().item()
        zeros[name] = (kernels.abs() < 3e-3).float().mean().item()
    assert norms["l1"][0] < 0.6 * norms["none"][0]
    assert norms["l2"][1] < 0.8 * norms["none"][1]
    assert zeros["l1"] > 2 * zeros["none"]
    assert zeros["l1"] > zeros["l2"]


def test_weight_decay_shrinks_weights(sample):
    sums = [weights(trained(sample, options(epochs=4, weight_decay=decay))[0]).square().sum() for decay in (0.0, 1.0)]
    assert sums[1] < 0.95 * sums[0]


def test_gradients_are_clipped_together(sample):
    """With plain gradients a step is no longer than rate times the norm, and has the gradient's direction."""
    config = options(**PLAIN, batch_size=200, shuffle=False)
    start = weights(build(config, config.seed, **PIXELS))
    free = weights(trained(sample, config)[0]) - start
    clipped = weights(trained(sample, config.model_copy(update={"clip_norm": 0.01}))[0]) - start
    assert free.norm() > 0.05 * 0.02
    assert clipped.norm().item() == pytest.approx(0.05 * 0.01, rel=1e-3)
    assert functional.cosine_similarity(free, clipped, dim=0).item() == pytest.approx(1, abs=1e-4)
    loose = trained(sample, config.model_copy(update={"clip_norm": 1e6}))[0]
    torch.testing.assert_close(weights(loose) - start, free)


def test_label_smoothing_changes_the_loss_by_its_formula(sample):
    """(1 - s) times the label's loss, and s times the mean over all classes: https://arxiv.org/abs/1512.00567."""
    config = options(**PLAIN | {"learning_rate": 1e-30}, label_smoothing=0.2)
    network, training = trained(sample, config)
    fitting, validation = runs.divide(sample[0], config)
    fitting = fitting.take(torch.arange(200))
    logs = train.predict(network, fitting.images).log_softmax(1)
    label = -logs.gather(1, fitting.labels[:, None]).mean()
    want = 0.8 * label - 0.2 * logs.mean()
    (metrics,) = training.history
    assert metrics.train_loss == pytest.approx(want.item(), rel=1e-4)
    assert metrics.validation_loss == pytest.approx(train.evaluate(network, validation)[0])  # is not smoothed


def test_the_average_follows_its_recursion(sample):
    config = options(**PLAIN, epochs=3, ema=0.8, batch_norm=True)
    seen = []
    network, training = trained(
        sample, config, on_step=lambda network: seen.append(copy.deepcopy(network.state_dict()))
    )
    average = build(config, config.seed, **PIXELS).state_dict()
    for update, current in enumerate(seen):
        decay = min(0.8, (1 + update) / (10 + update))
        for name, value in current.items():
            average[name] = decay * average[name] + (1 - decay) * value if value.is_floating_point() else value
    result = training.result()
    assert result.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(result[name], value, atol=1e-5, rtol=1e-4)
    assert not torch.equal(result["features.0.weight"], seen[-1]["features.0.weight"])
    _, validation = runs.divide(sample[0], config)
    assert training.history[-1].validation_loss == pytest.approx(train.evaluate(network, validation)[0])


def test_early_stopping_stops_when_nothing_gets_better(sample):
    config = options(**PLAIN | {"learning_rate": 1e-30}, epochs=20, early_stopping=3)
    _, training = trained(sample, config)
    assert training.best_epoch == 1
    assert len(training.history) == 4
    assert config.keep == "best"
    _, unhindered = trained(sample, options(epochs=5))
    assert len(unhindered.history) == 5


def test_keep_best_gives_the_best_epochs_weights(sample):
    """Trained towards the wrong labels, a network gets worse from epoch to epoch."""
    training_set = sample[0]
    wrong = Split(training_set.images, (training_set.labels + 1) % 10)
    results = {}
    for keep in ("best", "last"):
        config = options(epochs=8, keep=keep)
        _, validation = runs.divide(training_set, config)
        network = build(config, config.seed, **PIXELS)
        training = Training(network, wrong, validation, config)
        accuracies = [metrics.validation_accuracy for metrics in training.epochs()]
        assert accuracies[training.best_epoch - 1] == max(accuracies)
        network.load_state_dict(training.result())
        results[keep] = train.evaluate(network, validation)[1]
        assert results[keep] == (max(accuracies) if keep == "best" else accuracies[-1])
    assert results["last"] < results["best"]


def test_dropout_makes_training_depend_on_more_than_the_order(sample):
    plain, dropped = (trained(sample, options(dropout=rate))[1].history[0] for rate in (0.0, 0.5))
    assert dropped.train_loss > plain.train_loss  # of half a network
    again = trained(sample, options(dropout=0.5))[1].history[0]
    assert again.train_loss == dropped.train_loss  # drawn from the seed


@pytest.mark.parametrize("change", [{"shift": 4}, {"flip": True}, {"erase": 1.0}])
def test_augmented_images_are_trained_on(sample, change):
    plain, changed = (trained(sample, options(**PLAIN, **each))[1].history[0] for each in ({}, change))
    assert changed.train_loss != plain.train_loss


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_is_of_activations_and_not_of_weights(sample, precision, dtype):
    config = options(epochs=4, precision=precision)
    network = build(config, 0, **PIXELS)
    fitting, validation = runs.divide(sample[0], config)
    seen = set()
    network.features[0].register_forward_hook(lambda layer, given, out: seen.add((layer.training, out.dtype)))
    history = list(train.fit(network, fitting, validation, config))
    assert seen == {(True, dtype), (False, torch.float32)}  # validation is fp32
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert history[-1].train_loss < 0.8 * history[0].train_loss


def test_channels_last_lays_activations_out_by_pixels_and_not_the_result(sample):
    layouts = {}
    for channels_last in (True, False):
        config = options(channels=(4, 8), pool=2, channels_last=channels_last)
        network = build(config, 0, **PIXELS)
        layouts[channels_last] = set()
        network.features[0].register_forward_hook(
            lambda layer, given, out, key=channels_last: layouts[key].add(
                out.is_contiguous(memory_format=torch.channels_last)
            )
        )
        fitting, validation = runs.divide(sample[0], config)
        training = Training(network, fitting, validation, config)
        list(training.epochs())
        assert all(tensor.is_contiguous() for tensor in training.result().values())
    assert layouts == {True: {True}, False: {False}}


def test_compile_compiles_the_network(sample, monkeypatch):
    """With torch's quickest backend, which runs what was captured: its default one calls a C++ compiler for minutes."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    config = options(**PLAIN, channels=(), hidden=(8,), pool=2, shuffle=False)
    counters.clear()
    plain, _ = trained(sample, config)
    assert counters["stats"]["unique_graphs"] == 0
    compiled, _ = trained(sample, config.model_copy(update={"compile": True}))
    assert counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(weights(compiled), weights(plain), atol=1e-4, rtol=1e-3)


def test_streamed_images_stay_in_main_memory(sample):
    """`meta` stands for another device; torch has it everywhere."""
    elsewhere = torch.device("meta")
    assert runs.place(sample[0], elsewhere, stream=False).images.device == elsewhere
    assert runs.place(sample[0], elsewhere, stream=True).images.device.type == "cpu"


@pytest.mark.gpu
def test_streamed_images_give_the_same_network_on_a_gpu(sample):
    device, _ = devices.select_device("cuda")
    devices.set_deterministic()
    results = []
    for stream in (False, True):
        config = options(epochs=2, stream=stream)
        fitting, validation = runs.divide(sample[0], config)
        network = build(config, 0, **PIXELS).to(device)
        list(train.fit(network, runs.place(fitting, device, stream), validation.to(device), config))
        results.append(weights(network))
    assert torch.equal(*results)


def test_deterministic_decides_how_torch_works():
    devices.set_deterministic(False)
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert not torch.are_deterministic_algorithms_enabled()
    devices.set_deterministic(True)
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest"  # raises where old and new settings disagree


def test_normalise():
    dataset = DATASETS["mnist"]
    standard, unit = (
        build(**runs.pixel_statistics(TrainConfig(normalise=how), dataset)) for how in ("standard", "unit")
    )
    assert (standard.mean.item(), standard.std.item()) == pytest.approx((dataset.mean, dataset.std))
    assert (unit.mean.item(), unit.std.item()) == (0, 255)


def test_train_images_and_validation_images_divide_the_set(sample):
    fitting, validation = runs.divide(sample[0], options())
    assert (len(fitting), len(validation)) == (500, 100)
    fitting, validation = runs.divide(sample[0], options(train_images=70))
    assert (len(fitting), len(validation)) == (70, 100)
    fitting, validation = runs.divide(sample[0], options(validation_images=0))
    assert validation is None
    assert torch.equal(fitting.images, sample[0].images)
    with pytest.raises(ValueError, match="--train-images: got 501, want at most 500"):
        runs.divide(sample[0], options(train_images=501))


def test_without_validation_there_is_nothing_to_tell_of_it(sample):
    _, training = trained(sample, options(validation_images=0, epochs=2))
    assert [metrics.validation_accuracy for metrics in training.history] == [None, None]
    assert training.best_epoch == 0


def test_training_accuracy_is_counted(sample):
    network, training = trained(sample, options(**PLAIN | {"learning_rate": 1e-30}))
    fitting, _ = runs.divide(sample[0], options())
    want = train.evaluate(network, fitting.take(torch.arange(200)))[1]
    assert training.history[0].train_accuracy == pytest.approx(want)


def test_the_first_convolution_can_be_left_as_it_was_drawn(sample):
    """And everything behind it learns as if the first convolution were a part of the data."""
    config = options(**PLAIN, stem="frozen", shuffle=False, channels=(4, 6), pool=2)
    network, _ = trained(sample, config)
    drawn = build(config, 0, **PIXELS)
    first = ("features.0.weight", "features.0.bias")
    same = {name for name, value in network.state_dict().items() if torch.equal(value, drawn.state_dict()[name])}
    assert same == {*first, "mean", "std"}
    plain = build(config, 0, **PIXELS)
    fitting, _ = runs.divide(sample[0], config)
    for indices in in_order(50)(200):
        loss = functional.cross_entropy(plain(fitting.images[indices]), fitting.labels[indices])
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                if name not in first:
                    parameter -= config.learning_rate * parameter.grad
    assert torch.allclose(weights(network), weights(plain), atol=1e-6)


def test_a_whitened_stem_decorrelates_the_pixels(sample):
    """Its first outputs are the principal components, in order and of the same variance."""
    config = options(stem="whitened", channels=(20, 4), pool=2)
    network, _ = trained(sample, config)
    fitting, _ = runs.divide(sample[0], config)
    first = network.features[0]
    assert not torch.any(first.bias)
    images = network.normalise(fitting.images[:200])
    outputs = first(images).movedim(1, 0).flatten(1)[:9]
    products = outputs @ outputs.T / outputs.shape[1]
    patches = images.unfold(2, 3, 1).unfold(3, 3, 1).reshape(-1, 9)
    variances = torch.linalg.eigvalsh(patches.T @ patches / len(patches)).flip(0)
    want = variances / (variances + 0.01)  # nearly 1, but for the smallest, which are held back
    assert want[0] > 0.99
    assert torch.allclose(products, torch.diag(want), atol=1e-3)
    assert torch.equal(first.weight[9:18], -first.weight[:9])


def test_an_epoch_of_fewer_images_goes_on_with_the_others(sample):
    config = options(epoch_images=80, epochs=5, batch_size=40)
    seen = []
    network = build(config, 0, **PIXELS)
    fitting, validation = runs.divide(sample[0], config)
    training = Training(network, fitting.take(torch.arange(200)), validation, config)
    training._batch = lambda indices: seen.append(indices) or Training._batch(training, indices)
    for _ in training.epochs():
        pass
    order = torch.cat(seen)
    assert len(order) == 400
    assert sorted(order[:200].tolist()) == sorted(order[200:].tolist()) == list(range(200))
    assert [metrics.train_loss > 0 for metrics in training.history] == [True] * 5


def test_the_hardest_images_are_learned_from(sample):
    """The first epoch learns from all; later steps see twice as many, and learn from the worse half."""
    config = options(**PLAIN, hardest=0.5, epochs=2, shuffle=False)
    network, training = trained(sample, config)
    plain = build(config, 0, **PIXELS)
    fitting, _ = runs.divide(sample[0], config)
    losses = []

    def step(batch):
        loss = functional.cross_entropy(plain(batch.images), batch.labels)
        plain.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= config.learning_rate * parameter.grad

    for indices in in_order(50)(200):
        step(fitting.take(indices))
    for indices in in_order(100)(200):
        batch = fitting.take(indices)
        each = functional.cross_entropy(plain(batch.images), batch.labels, reduction="none").detach()
        losses.append(each)
        step(batch.take(each.topk(50).indices))
    assert torch.allclose(weights(network), weights(plain), atol=1e-6)
    assert training.history[1].train_loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)  # of all


def test_a_training_of_parts_of_the_images_is_resumed_to_the_same_weights(sample):
    config = options(stem="whitened", channels=(20, 4), pool=2, epoch_images=80, hardest=0.5, epochs=4, batch_size=40)
    fitting, validation = runs.divide(sample[0], config)
    fitting = fitting.take(torch.arange(200))

    def begun():
        return Training(build(config, 0, **PIXELS), fitting, validation, config)

    whole, first, second = begun(), begun(), begun()
    for _ in whole.epochs():
        pass
    epochs = first.epochs()
    next(epochs), next(epochs)  # the second began with images that the first had left
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in second.epochs():
        pass
    assert len(second.history) == 4
    assert all(torch.equal(value, second.result()[name]) for name, value in whole.result().items())


@pytest.mark.parametrize(
    ("changes", "processes", "problem"),
    [
        ({"epoch_images": 201}, ALONE, "--epoch-images: got 201, want at most 200"),
        ({"hardest": 0.5}, Processes(0, 2), "--hardest compares all images of a step, and 2 processes share them here"),
    ],
)
def test_what_cannot_be_done_with_these_images(sample, changes, processes, problem):
    config = options(**changes)
    fitting, _ = runs.divide(sample[0], config)
    with pytest.raises(ValueError, match=problem):
        Training(build(config, 0, **PIXELS), fitting.take(torch.arange(200)), None, config, processes=processes)


def test_memory_of_activations_is_kept():
    """After a first step, steps with large activations take no fresh pages from the kernel; glibc only."""
    resource = pytest.importorskip("resource")
    if not memory.keep_freed_memory():
        pytest.skip("not glibc")

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        (torch.ones(4_000_000) * 2).sum()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(5)) < 1000  # two blocks of 16 MB are 7800 pages


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(os, "confstr", lambda name: "musl 1.2")
    glibc.cache_clear()
    try:
        assert glibc() is None
        assert memory.keep_freed_memory() is False
    finally:
        glibc.cache_clear()


def test_empty_share_of_a_batch(sample):
    """More processes than the last batch has images: those that get none must still take part."""
    network = build(options(), 0, **PIXELS)
    logits = network(sample[0].images[:0])
    assert logits.shape == (0, 10)
    functional.cross_entropy(logits, sample[0].labels[:0], reduction="sum").backward()
    assert all(parameter.grad.count_nonzero() == 0 for parameter in network.parameters())
