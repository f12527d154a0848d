"""The typed client against a real server."""

import asyncio
import threading
import time

import numpy as np
import pytest
from conftest import MODEL, running
from PIL import Image

from serving.client import AsyncClient, Client, predict_request
from serving.errors import InvalidArgument, NotFound, Unavailable
from serving.images import Polarity


@pytest.fixture
def images(sample) -> np.ndarray:
    return sample[1].images.numpy()


def classes(result) -> list[int]:
    return [prediction.class_id for prediction in result.predictions]


def test_every_kind_of_image_gives_the_same_answer(served, images, reference, tmp_path):
    path = tmp_path / "boot.png"
    Image.fromarray(images[0, 0]).save(path)
    kinds = [
        images[0, 0],
        images[0],
        images[:1],
        Image.fromarray(images[0, 0]),
        path,
        str(path),
        path.read_bytes(),
        [images[0, 0]],
        [path],
    ]
    with Client(served) as client:
        answers = [client.predict(kind).predictions for kind in kinds]
    assert all(len(answer) == 1 for answer in answers)
    assert {answer[0].class_id for answer in answers} == {reference[0].argmax()}
    assert len({round(answer[0].probability, 5) for answer in answers}) == 1


def test_batches_and_mixed_pictures(served, images, reference, tmp_path):
    path = tmp_path / "1.png"
    Image.fromarray(images[1, 0]).save(path)
    want = reference.argmax(1).tolist()
    with Client(served) as client:
        assert classes(client.predict(images[:7])) == want[:7]
        assert classes(client.predict(images[:7, 0])) == want[:7]
        assert classes(client.predict([images[0], images[1, 0], images[2:4]])) == want[:4]
        assert classes(client.predict([Image.fromarray(images[0, 0]), path, path.read_bytes()])) == [
            want[0],
            want[1],
            want[1],
        ]


def test_polarity_is_passed_on(served, images, reference):
    inverted = Image.fromarray(255 - images[0, 0])
    with Client(served) as client:
        assert classes(client.predict(inverted, polarity=Polarity.DARK_ON_LIGHT)) == [reference[0].argmax()]
        right = client.predict(inverted).predictions[0]
        wrong = client.predict(inverted, polarity=Polarity.LIGHT_ON_DARK).predictions[0]
    assert right.probability != pytest.approx(wrong.probability, abs=1e-6)


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ([], "images: got none"),
        (np.zeros((28, 28)), "image: got dtype float64, want uint8"),
        (np.zeros(784, np.uint8), r"image: got shape \[784\], want \[28,28\]"),
        ([np.zeros((28, 28), np.uint8), b"x"], "arrays and pictures together"),
        (np.zeros((2, 3, 28, 28), np.uint8), r"image: got shape \[2,3,28,28\], want \[batch,1,28,28\]"),
    ],
)
def test_a_wrong_image_is_refused(served, images, problem):
    with Client(served) as client, pytest.raises(InvalidArgument, match=problem):
        client.predict(images)


@pytest.mark.parametrize("top_k", [-3, 0, 2**32])
def test_a_wrong_number_of_classes_is_named(images, top_k):
    with pytest.raises(InvalidArgument, match=f"^top_k: got {top_k}, want a whole number from 1 up$"):
        predict_request(images[:1], top_k=top_k)


def test_a_version_is_a_number_or_text(served, images):
    with Client(served) as client:
        assert client.predict(images[:1], version=1) == client.predict(images[:1], version="1")
        with pytest.raises(NotFound, match="version 2 is not found"):
            client.predict(images[:1], version=2)


def test_a_missing_file_is_an_os_error():
    with pytest.raises(FileNotFoundError):
        predict_request("none.png")


def test_the_servers_errors_are_ours(served, images):
    with Client(served) as client:
        with pytest.raises(NotFound, match="unknown model: 'cats' is not found"):
            client.predict(images[:1], model="cats")
        with pytest.raises(InvalidArgument, match="top_k: got 99"):
            client.predict(images[:1], top_k=99)


def test_an_unreachable_server_is_named():
    with Client("127.0.0.1:1", timeout_s=20) as client:
        start = time.monotonic()
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: "):
            client.list_models()
        assert time.monotonic() - start > 0.2  # it was tried again


def test_a_server_that_comes_a_moment_later_is_waited_for(repository, images):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = []

    def call():
        with Client(f"127.0.0.1:{port}") as client:
            answers.append(client.predict(images[:2]))

    caller = threading.Thread(target=call)
    caller.start()
    with running(repository, port=port):
        caller.join(20)
    assert len(answers[0].predictions) == 2


def test_streams(served, images, reference):
    requests = [predict_request(images[i : i + 2]) for i in range(0, 20, 2)]
    requests[4].raw.pixels = b"short"
    with Client(served) as client:
        answers = list(client.predict_stream(requests))
    assert isinstance(answers[4], InvalidArgument)
    want = reference.argmax(1).tolist()
    assert [classes(answer) for i, answer in enumerate(answers) if i != 4] == [
        want[i : i + 2] for i in range(0, 20, 2) if i != 8
    ]


def test_the_asyncio_client(served, images, reference):
    async def scenario():
        async with AsyncClient(served) as client:
            results = await asyncio.gather(*(client.predict(images[i : i + 1]) for i in range(30)))
            assert [classes(result)[0] for result in results] == reference[:30].argmax(1).tolist()
            assert [model.name for model in await client.list_models()] == [MODEL]

            async def requests():
                for i in range(5):
                    yield predict_request(images[i : i + 1])

            answers = [answer async for answer in client.predict_stream(requests())]
            assert [classes(answer)[0] for answer in answers] == reference[:5].argmax(1).tolist()
            with pytest.raises(NotFound):
                await client.predict(images[:1], model="cats")

    asyncio.run(scenario())
