import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from serving.errors import InvalidArgument
from serving.images import FORMATS, Polarity, decode
from trainer import data
from trainer.data import DATASETS

LIMIT = 1_000_000


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=form, **options)
    return buffer.getvalue()


def decoded(content: bytes, polarity: Polarity = Polarity.AUTO, limit: int = LIMIT) -> np.ndarray:
    return decode(content, 28, 28, polarity, limit)[0]


@pytest.fixture
def image(sample) -> np.ndarray:
    """An ankle boot, uint8 [28, 28]."""
    return sample[1].images[0, 0].numpy()


def drawn_digit(seed: int = 0) -> np.ndarray:
    """A seven in light strokes on dark, uint8 [28, 28]."""
    canvas = np.zeros((28, 28), np.uint8)
    canvas[5:8, 6:22] = 255
    for row in range(8, 24):
        column = 21 - (row - 8) // 2
        canvas[row, column - 2 : column + 1] = 255
    return canvas


def test_a_picture_of_the_models_size_keeps_its_pixels(image):
    assert np.array_equal(decoded(encoded(Image.fromarray(image))), image[np.newaxis])


def test_dark_on_light_is_inverted(image):
    assert np.array_equal(decoded(encoded(Image.fromarray(255 - image)))[0], image)


def test_polarity_can_be_given(image):
    content = encoded(Image.fromarray(255 - image))
    assert np.array_equal(decoded(content, Polarity.LIGHT_ON_DARK)[0], 255 - image)
    assert np.array_equal(decoded(encoded(Image.fromarray(image)), Polarity.DARK_ON_LIGHT)[0], 255 - image)


@pytest.mark.data
@pytest.mark.parametrize("name", DATASETS)
def test_polarity_is_detected_on_every_test_image(data_dir, name):
    from serving.images import _is_dark_on_light

    images = data.load_test(DATASETS[name], data_dir).images.numpy()[:, 0]
    assert not any(_is_dark_on_light(image, Polarity.AUTO) for image in images)
    assert all(_is_dark_on_light(255 - image, Polarity.AUTO) for image in images)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(form):
    got = decoded(encoded(Image.fromarray(drawn_digit()), form))
    assert got.shape == (1, 28, 28)
    assert np.abs(got[0].astype(int) - drawn_digit()).mean() < 10  # some formats lose a little


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "1", "I;16", "CMYK"])
def test_every_kind_of_pixel(mode):
    digit = Image.fromarray(drawn_digit())
    deep = Image.fromarray(drawn_digit().astype(np.uint16) * 257)
    picture = deep if mode == "I;16" else digit.convert(mode)
    got = decoded(encoded(picture, "JPEG", quality=100) if mode == "CMYK" else encoded(picture))
    difference = np.abs(got[0].astype(int) - drawn_digit())
    assert difference.max() <= (8 if mode == "CMYK" else 0)  # JPEG, the one format with CMYK, loses a little


def test_transparency_is_paper():
    """Black ink on a transparent ground: the ground must not come out as black as the ink."""
    ink = np.zeros((28, 28, 4), np.uint8)
    ink[..., 3] = drawn_digit()
    assert np.array_equal(decoded(encoded(Image.fromarray(ink)))[0], drawn_digit())


def photograph(noise: float = 5.0) -> Image.Image:
    """The digit in ink on a sheet in uneven light, 900 x 700."""
    page = np.full((700, 900), 255.0)
    page[100:600, 200:700] = 255 - np.asarray(Image.fromarray(drawn_digit()).resize((500, 500)), dtype=float)
    light = np.linspace(0.6, 0.9, 900) * np.linspace(1.0, 0.85, 700)[:, np.newaxis]
    grain = np.random.default_rng(0).normal(0, noise, page.shape)
    return Image.fromarray(((40 + 0.8 * page) * light + grain).clip(0, 255).astype(np.uint8)).convert("RGB")


def test_a_photograph_becomes_light_on_a_dark_ground():
    got = decoded(encoded(photograph(), "JPEG", quality=80))[0].astype(int)
    assert got.max() == 255
    assert np.median(got) <= 3
    small = np.asarray(Image.fromarray(drawn_digit()).resize((16, 16), Image.Resampling.LANCZOS), dtype=int)
    patch = got[6:22, 6:22]  # 500 of 900 pixels are 16 of 28
    assert np.corrcoef(patch.ravel(), small.ravel())[0, 1] > 0.9


def test_resizing_is_antialiased():
    """Lines one pixel wide, four apart, must come out grey all over; picking pixels would show all or nothing."""
    stripes = np.zeros((112, 112), np.uint8)
    stripes[:, 2::4] = 255
    stripes[:8] = 0
    stripes[-8:] = 0
    stripes[:, :8] = 0
    stripes[:, -8:] = 0
    inner = decoded(encoded(Image.fromarray(stripes)), Polarity.LIGHT_ON_DARK)[0][6:22, 6:22].astype(int)
    assert inner.std() < 0.2 * inner.mean()


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (14, 14), (28, 27), (300, 50)])
def test_every_size_and_proportion(size):
    picture = Image.fromarray(drawn_digit()).resize(size)
    assert decoded(encoded(picture)).shape == (1, 28, 28)


def test_orientation_in_exif_is_respected():
    upright = Image.fromarray(drawn_digit()).resize((280, 280))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to the right
    turned = encoded(upright.rotate(90), "JPEG", exif=exif, quality=95)
    assert np.abs(decoded(turned).astype(int) - decoded(encoded(upright)).astype(int)).mean() < 3


def test_a_large_picture_of_every_depth_is_reduced_first():
    large = Image.fromarray(drawn_digit()).resize((2800, 2800), Image.Resampling.NEAREST)
    deep = Image.fromarray(np.asarray(large).astype(np.uint16) * 257)
    plain = decoded(encoded(large), limit=10_000_000)[0].astype(int)
    assert np.corrcoef(plain.ravel(), drawn_digit().ravel())[0, 1] > 0.98
    for picture in (large.convert("RGBA"), large.convert("P"), large.convert("1"), deep):
        got = decoded(encoded(picture), limit=10_000_000)[0].astype(int)
        assert np.abs(got - plain).max() <= 2
    assert decode(encoded(large), 28, 28, Polarity.AUTO, 10_000_000)[1] == 2800 * 2800


def test_damaged_exif_is_no_rotation():
    upright = Image.fromarray(drawn_digit())
    broken = encoded(upright, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x07\0\xff\xff\xff\xff\0\0")
    assert np.array_equal(decoded(broken)[0], drawn_digit())


def test_a_blank_sheet_is_blank():
    assert not decoded(encoded(Image.new("RGB", (300, 200), (180, 175, 170)))).any()


def test_a_deep_picture_is_not_clipped():
    deep = (np.arange(28 * 28, dtype=np.uint16) * 80).reshape(28, 28)
    got = decoded(encoded(Image.fromarray(deep)), Polarity.LIGHT_ON_DARK)[0]
    assert len(np.unique(got)) > 200


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "0 bytes that are not a picture; want one of PNG, JPEG"),
        (b"hello", "5 bytes that are not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "are not a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "picture"),
        (encoded(photograph(), "JPEG")[:2000], "a damaged picture"),
        (encoded(photograph())[:5000], "a damaged picture"),
    ],
    ids=["empty", "text", "PostScript", "PNG garbage", "JPEG cut", "PNG cut"],
)
def test_what_is_not_a_picture_is_refused(content, problem):
    with pytest.raises(InvalidArgument, match=problem):
        decoded(content)


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def bomb(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        # The pixels are garbage: decoding any of them would be another error than the one wanted.
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"not pixels") + chunk(b"IEND", b"")

    with pytest.raises(InvalidArgument, match=r"picture of 2000 x 600 pixels, want at most 1000000 in all"):
        decoded(bomb(2000, 600))
    with pytest.raises(InvalidArgument, match=r"a picture too large: .*2500000000 pixels"):
        decoded(bomb(50_000, 50_000))
    with pytest.raises(InvalidArgument, match="a damaged picture"):
        decoded(bomb(500, 500))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow has to say about damaged files
def test_random_damage_is_never_another_error():
    rng = np.random.default_rng(0)
    originals = [encoded(Image.fromarray(drawn_digit()), form) for form in FORMATS]
    for number in range(1500):
        content = bytearray(originals[number % len(originals)])
        for position in rng.integers(0, len(content), rng.integers(1, 8)):
            content[position] = rng.integers(0, 256)
        with contextlib.suppress(InvalidArgument):
            assert decoded(bytes(content)).shape == (1, 28, 28)
