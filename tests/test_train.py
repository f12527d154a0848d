import math

import pytest
import torch

from serving.backends.cuda import device_problem
from serving.errors import DeviceError
from trainer import data, devices, train
from trainer.config import DEFAULT_EPOCHS, TrainConfig
from trainer.data import DATASETS

CONFIG = TrainConfig(
    dataset="fashion-mnist", epochs=2, batch_size=60, validation_images=100, flip=False, label_smoothing=0
)


def fitted(sample, config):
    fitting, validation = data.split_validation(sample[0], config.validation_images, config.seed)
    network = train.build(config, config.seed, mean=DATASETS["fashion-mnist"].mean, std=DATASETS["fashion-mnist"].std)
    return network, list(train.fit(network, fitting, validation, config))


def test_training_learns(sample):
    network, history = fitted(sample, CONFIG.model_copy(update={"epochs": 5}))
    assert history[-1].train_loss < 0.75 * history[0].train_loss
    assert history[-1].validation_accuracy > 0.6  # guessing gives 0.1
    loss, accuracy = train.evaluate(network, sample[1])
    assert accuracy > 0.6
    assert 0 < loss < math.log(10)


def test_the_same_seed_gives_the_same_weights_bit_for_bit(sample, all_threads):
    one, first = fitted(sample, CONFIG)
    two, second = fitted(sample, CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert [m.train_loss for m in first] == [m.train_loss for m in second]
    other, _ = fitted(sample, CONFIG.model_copy(update={"seed": 1}))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_metrics_of_every_epoch(sample):
    seen = []
    fitting, validation = data.split_validation(sample[0], 100, 0)
    network = train.build(seed=0, mean=72.9, std=90.0)
    history = list(train.fit(network, fitting, validation, CONFIG, seen.append))
    assert [m.epoch for m in history] == [1, 2]
    assert sum(seen) == 2 * 500
    assert all(m.seconds > 0 for m in history)
    assert all(m.images_per_s == pytest.approx(500 / m.seconds) for m in history)
    assert 0 <= history[-1].learning_rate < history[0].learning_rate <= CONFIG.learning_rate


def test_training_loss_is_the_mean_over_images_with_a_smaller_last_batch(sample):
    """With a step size of nearly nothing the epoch's loss is the initial network's loss over the whole set."""
    config = CONFIG.model_copy(update={"epochs": 1, "learning_rate": 1e-30, "batch_size": 70})
    fitting, validation = data.split_validation(sample[0], 100, 0)
    network = train.build(seed=0, mean=72.9, std=90.0)
    want, _ = train.evaluate(network, fitting)
    (metrics,) = train.fit(network, fitting, validation, config)
    assert metrics.train_loss == pytest.approx(want, rel=1e-4)


def test_validation_images_are_not_trained_on(sample):
    fitting, validation = data.split_validation(sample[0], 100, 3)
    assert (len(fitting), len(validation)) == (500, 100)
    train_images = {image.numpy().tobytes() for image in fitting.images}
    assert not train_images & {image.numpy().tobytes() for image in validation.images}
    with pytest.raises(ValueError, match="validation images: got 600, want 1 to 599"):
        data.split_validation(sample[0], 600, 0)


def test_a_device_that_is_named_never_falls_back():
    assert devices.select_device("cpu") == (torch.device("cpu"), "asked for")
    if problem := device_problem(0):
        with pytest.raises(DeviceError) as raised:
            devices.select_device("cuda")
        assert str(raised.value) == problem
        with pytest.raises(DeviceError, match=r"cuda:7|driver"):
            devices.select_device("cuda:7")
    if not torch.backends.mps.is_available():
        with pytest.raises(DeviceError, match="mps: torch finds no Apple GPU"):
            devices.select_device("mps")


def test_auto_says_why():
    device, why = devices.select_device("auto")
    assert why.startswith("auto: ")
    assert device.type != "cpu" or device_problem(0) in why


def test_epochs_default_by_data_set():
    assert TrainConfig(dataset="mnist").epochs == DEFAULT_EPOCHS["mnist"] == 3
    assert TrainConfig(dataset="fashion-mnist").epochs == DEFAULT_EPOCHS["fashion-mnist"] == 10
    assert TrainConfig(dataset="fashion-mnist", epochs=1).epochs == 1


@pytest.mark.data
@pytest.mark.parametrize(("name", "epochs", "accuracy"), [("mnist", 1, 0.982), ("fashion-mnist", 2, 0.885)])
def test_the_default_options_learn_in_fewer_epochs_than_by_default(data_dir, all_threads, name, epochs, accuracy):
    """What they reach in all of them stands in docs/training.md, with the command that measures it."""
    config = TrainConfig(dataset=name, epochs=epochs)
    training, test = data.load(DATASETS[name], data_dir)
    fitting, validation = data.split_validation(training, config.validation_images, config.seed)
    network = train.build(config, config.seed, mean=DATASETS[name].mean, std=DATASETS[name].std)
    device, _ = devices.select_device("auto")
    for _ in train.fit(network.to(device), fitting.to(device), validation.to(device), config):
        pass
    assert train.evaluate(network, test.to(device))[1] >= accuracy


@pytest.mark.gpu
def test_training_on_cuda(sample):
    device, _ = devices.select_device("cuda")
    fitting, validation = data.split_validation(sample[0], 100, 0)
    network = train.build(seed=0, mean=72.9, std=90.0).to(device)
    history = list(train.fit(network, fitting.to(device), validation.to(device), CONFIG))
    assert history[-1].train_loss < history[0].train_loss
    assert next(network.parameters()).device == device
