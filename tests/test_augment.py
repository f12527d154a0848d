import pytest
import torch

from trainer import augment
from trainer.config import TrainConfig


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    """400 images of which no two rows or columns are alike, and no pixel is 0."""
    return torch.randint(1, 256, (400, 1, 28, 28), dtype=torch.uint8, generator=generator(1))


def test_shift_moves_each_image_by_up_to_so_many_pixels(images):
    moved = augment.shift(images, 2, generator())
    assert (moved.shape, moved.dtype) == (images.shape, torch.uint8)
    offsets = []
    for before, after in zip(images[:, 0], moved[:, 0], strict=True):
        found = []
        for down in range(-2, 3):
            for right in range(-2, 3):
                want = torch.zeros_like(before)
                rows, columns = (slice(max(0, by), 28 + min(0, by)) for by in (down, right))
                sources = (slice(max(0, -by), 28 - max(0, by)) for by in (down, right))
                want[rows, columns] = before[tuple(sources)]
                if torch.equal(after, want):
                    found.append((down, right))
        assert len(found) == 1
        offsets += found
    assert len(set(offsets)) == 25  # each of the offsets, among so many images


def test_flip_mirrors_half_of_the_images(images):
    flipped = augment.flip(images, generator())
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images.flip(3)).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 160 < mirrored.sum() < 240  # four deviations


def test_erase_fills_a_rectangle_of_some_images(images):
    erased = augment.erase(images, 0.5, generator())
    changed = erased != images
    touched = changed.any(3).any(2).any(1)
    assert 160 < touched.sum() < 240
    shapes = set()
    for change in changed[touched][:, 0]:
        rows, columns = change.any(1).nonzero(), change.any(0).nonzero()
        tall = int(rows.max() - rows.min()) + 1
        wide = int(columns.max() - columns.min()) + 1
        # All but the odd pixel, for which the noise chose what was there.
        assert change.sum() > 0.95 * tall * wide - 2
        assert 0.01 * 784 < tall * wide < 0.45 * 784
        shapes.add((tall, wide))
    assert len(shapes) > 50
    assert len(erased[changed].unique()) > 200  # noise, not one colour


def test_erase_with_certainty_and_never(images):
    assert (augment.erase(images, 1.0, generator()) != images).any(3).any(2).any(1).all()
    assert torch.equal(augment.erase(images, 0.0, generator()), images)


def test_the_generator_alone_decides(images):
    config = TrainConfig(dataset="fashion-mnist", shift=3, flip=True, erase=0.5)
    one, same = (augment.augment(images, config, generator(7)) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, augment.augment(images, config, generator(8)))


@pytest.mark.parametrize("option", [{"shift": 2}, {"flip": True}, {"erase": 0.5}])
def test_each_option_alone_changes_images(images, option):
    config = TrainConfig(dataset="fashion-mnist", **{"flip": False, **option})
    assert not torch.equal(augment.augment(images, config, generator()), images)


def test_without_options_nothing_changes(images):
    assert augment.augment(images, TrainConfig(), generator()) is images


def test_no_images_are_changed_into_none(images):
    """A process may have no part of a small batch."""
    config = TrainConfig(dataset="fashion-mnist", shift=3, flip=True, erase=0.5)
    assert augment.augment(images[:0], config, generator()).shape == (0, 1, 28, 28)
