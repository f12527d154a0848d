"""What the tests share: a real sample, a network trained on it, its exported bundle, and servers on real ports."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import serving.loading
from serving.backends import Backend
from serving.backends.cuda import device_problem
from serving.bundle import MANIFEST, MANIFEST_SHA256, Bundle, open_bundle
from serving.config import ServerConfig
from serving.repository import Repository
from serving.server import Server
from trainer import artefacts, data, runs, train
from trainer.checkpoint import Checkpoint
from trainer.config import TrainConfig
from trainer.data import DATASETS, Split
from trainer.export import export

SAMPLE = Path(__file__).parent / "data" / "fashion-sample.npz"
MODEL = "fashion-mnist"
THREADS = torch.get_num_threads()  # as many as torch takes by itself


def pytest_report_header() -> str:
    names = ("torch", "onnxruntime-gpu", "onnxruntime", "onnx", "grpcio", "protobuf", "numpy")
    versions = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    return f"versions: {', '.join(versions)}; CUDA: {device_problem(0) or 'present'}"


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    """A test marked `gpu` is skipped with the reason, or fails with REQUIRE_GPU=1, where there is no CUDA device."""
    if request.node.get_closest_marker("gpu") and (problem := device_problem(0)):
        if os.environ.get("REQUIRE_GPU") == "1":
            pytest.fail(f"REQUIRE_GPU=1, but {problem}")
        pytest.skip(problem)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Nearly all that is trained and run here is too small to gain from more, which wait long on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """torch's number of threads is the whole process's: a test that opens a TorchScript backend changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def all_threads() -> None:
    """For what is large enough to gain from them, or must be so with several."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Both data sets in full; skipped with the reason, or failing with REQUIRE_DATA=1, where they cannot be had."""
    folder = data.default_data_dir()
    for dataset in DATASETS.values():
        try:
            data.obtain(dataset, folder)
        except data.DataError as error:
            if os.environ.get("REQUIRE_DATA") == "1":
                pytest.fail(f"REQUIRE_DATA=1, but {error}")
            pytest.skip(str(error))
    return folder


@pytest.fixture(scope="session")
def sample() -> tuple[Split, Split]:
    """600 training and 150 test images of Fashion-MNIST."""
    with np.load(SAMPLE) as arrays:
        splits = [
            Split(
                torch.tensor(arrays[f"{part}_images"]).unsqueeze(1),
                torch.tensor(arrays[f"{part}_labels"], dtype=torch.int64),
            )
            for part in ("train", "test")
        ]
    return splits[0], splits[1]


@pytest.fixture(scope="module")
def small_data(sample: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Both data sets as files of the sample, which pass for the whole: the commands read them as any."""
    folder = tmp_path_factory.mktemp("data")
    arrays = [array.numpy() for split in sample for array in (split.images[:, 0], split.labels.byte())]
    files = {}
    for name, array in zip(DATASETS["mnist"].sha256, arrays, strict=True):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        files[name] = header + array.tobytes()
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(data.DATA_DIR_VARIABLE, str(folder))
        for name, dataset in list(DATASETS.items()):
            patch.setitem(DATASETS, name, replace(dataset, sha256=hashes))
            (folder / name).mkdir()
            for file, content in files.items():
                (folder / name / file).write_bytes(content)
        yield


@pytest.fixture(scope="session")
def checkpoint(sample: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The seed CNN, trained on the sample for a second: real weights, if not good ones."""
    config = TrainConfig(dataset=MODEL, epochs=4, batch_size=50, validation_images=50, device="cpu")
    return runs.run(config, sample, runs.Files(tmp_path_factory.mktemp("runs") / "net.pt"))


@pytest.fixture(scope="session")
def repository(checkpoint: Checkpoint, sample: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with one exported version. Tests read it; `tampered` gives one to damage."""
    root = tmp_path_factory.mktemp("exported")
    export(checkpoint, sample[1], root)
    return root


@pytest.fixture(scope="session")
def full_repository(
    checkpoint: Checkpoint, sample: tuple[Split, Split], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A repository whose one version has every artefact that needs no compiler. Tests only read it."""
    root = tmp_path_factory.mktemp("full")
    chosen = artefacts.choose(["onnx", "torchscript", "pt2"], ["fp32", "fp16", "int8"])
    export(checkpoint, sample[1], root, chosen=chosen, calibration=sample[0].images)
    return root


@pytest.fixture
def bundle(repository: Path) -> Bundle:
    return open_bundle(repository / MODEL / "1")


@pytest.fixture
def tampered(repository: Path, tmp_path: Path) -> Path:
    """A copy of the repository that a test may damage."""
    root = tmp_path / "exported"
    shutil.copytree(repository, root)
    return root


@pytest.fixture
def source(bundle: Bundle) -> Path:
    """The folder of the version that `publish` makes others from."""
    return bundle.path


@pytest.fixture
def root(source: Path, tmp_path: Path) -> Path:
    """A repository with version 1, made by `publish`."""
    from versions_load import publish  # which needs this module

    (tmp_path / "exported" / MODEL).mkdir(parents=True)
    publish(source, tmp_path / "exported", 1)
    return tmp_path / "exported"


@pytest.fixture
def following(root: Path) -> Iterator[Callable[..., Repository]]:
    """A repository that follows its folder, and is told when to look."""
    made: list[Repository] = []

    def follow(**settings: object) -> Repository:
        config = ServerConfig(**{"repository": root, "device": "cpu", "model_control": "poll", **settings})
        made.append(Repository(config))
        made[-1].scan()
        made[-1].load_all()
        return made[-1]

    yield follow
    for repository in made:
        repository.close()


def edit_manifest(folder: Path, **changes: object) -> None:
    """Change fields of a version's manifest by hand, and hide it from the hash beside it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    document = json.dumps(manifest | changes)
    (folder / MANIFEST).write_text(document)
    (folder / MANIFEST_SHA256).write_text(f"{hashlib.sha256(document.encode()).hexdigest()}  {MANIFEST}\n")


def rehash(version: Path, name: str) -> None:
    """Make the manifest agree with a file that was changed, as someone who hides the change would."""
    content = (version / name).read_bytes()
    files = json.loads((version / MANIFEST).read_text())["files"]
    files[name] |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    edit_manifest(version, files=files)


@dataclass
class Running:
    """A server that runs in this process, in a thread with an event loop of its own."""

    server: Server
    address: str
    loop: asyncio.AbstractEventLoop

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop).result()


@contextlib.contextmanager
def running(repository: Path, **settings: object) -> Iterator[Running]:
    """Serve a repository on a free port until the block ends; everything in it has been loaded."""
    config = ServerConfig(**{"repository": repository, "port": 0, "device": "cpu", "drain_s": 1.0, **settings})
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def begin() -> Running:
        server = Server(config)
        try:
            address = await server.start()
            await server.load()
        except BaseException:
            await server.stop()
            raise
        return Running(server, address, loop)

    try:
        started = asyncio.run_coroutine_threadsafe(begin(), loop).result()
        try:
            yield started
        finally:
            started.stop()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Held:
    """A backend that runs only while it is let go, and counts its runs."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.released = threading.Event()
        self.started = threading.Event()
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.started.set()
        assert self.released.wait(30)
        self.runs += 1
        return self._backend.run(inputs)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once it holds, which must be soon."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@contextlib.contextmanager
def holding(repository: Path, monkeypatch: pytest.MonkeyPatch, **settings: object) -> Iterator[tuple[Running, Held]]:
    """As `running`, with a model that is held, and its backend; let go at the end."""
    opened: list[Held] = []
    real = serving.loading.open_backend

    def hold(*arguments: Any) -> Held:
        opened.append(Held(real(*arguments)))
        opened[0].released.set()  # for the golden check
        return opened[0]

    monkeypatch.setattr(serving.loading, "open_backend", hold)
    with running(repository, **settings) as server:
        (backend,) = opened
        backend.released.clear()
        backend.started.clear()
        backend.runs = 0
        yield server, backend
        backend.released.set()


@pytest.fixture(scope="session")
def served(repository: Path) -> Iterator[str]:
    """The address of a server with the sample's model."""
    with running(repository) as server:
        yield server.address


@pytest.fixture(scope="session")
def reference(repository: Path, sample: tuple[Split, Split]) -> np.ndarray:
    """What eager PyTorch answers for the sample's test images: probabilities float32 [150, 10]."""
    from trainer import parity

    network = parity.reference(open_bundle(repository / MODEL / "1"))
    return torch.softmax(train.predict(network, sample[1].images), dim=1).numpy()
