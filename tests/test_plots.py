"""The pictures, read back from the figures' own axes: what they show is what the network did."""

import itertools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, edit_manifest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from test_cli import trainer_here
from torch import nn

import trainer.__main__
import trainer.commands.export
from serving.bundle import MANIFEST, open_bundle
from serving.parity import softmax
from trainer import checkpoint as checkpoints
from trainer import features, pictures, plots, scores
from trainer.data import DATASETS
from trainer.train import predict

ROOT = Path(__file__).parents[1]
LABELS = DATASETS[MODEL].labels
DIGITS = tuple("0123456789")


class Small(nn.Module):
    """A network of given layers, over pixels from 0 to 1."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layers(image / 255)


def deep() -> Small:
    """Three convolutions: the last one's 70 maps are more than are drawn, and one pixel each."""
    layers = [nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 20, 3, stride=2), nn.ReLU(), nn.Conv2d(20, 70, 5)]
    return Small(*layers, nn.Flatten(), nn.Linear(70, 10))


def flat() -> Small:
    return Small(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))


@pytest.fixture
def subject(checkpoint):
    return pictures.of_checkpoint(checkpoint, Path("runs/net.pt"))


@pytest.fixture
def probabilities(subject, sample):
    return softmax(predict(subject.network, sample[1].images).numpy())


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def assert_nothing_is_clipped(figure) -> None:
    """All that is drawn lies within the picture, and no two labels of an axis lie on each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    drawn, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert min(drawn.x0, drawn.y0) > -0.005, drawn  # inches
    assert drawn.x1 < width + 0.005, drawn
    assert drawn.y1 < height + 0.005, drawn
    for axes in figure.axes:
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            inside = [tick for tick in axis.get_major_ticks() if min(limits) <= tick.get_loc() <= max(limits)]
            labels = [label for tick in inside for label in (tick.label1, tick.label2) if label.get_visible()]
            shown = [label for label in labels if axes.axison and label.get_text() and not label.get_rotation()]
            boxes = [label.get_window_extent(renderer) for label in shown]
            for one, other in itertools.pairwise(boxes):
                assert not one.overlaps(other), f"{[label.get_text() for label in shown]} run into each other"


def test_what_is_clipped_or_overlaps_is_noticed():
    figure = plots.curves(HISTORY, "Training")
    assert_nothing_is_clipped(figure)
    figure.text(0.99, 0.5, "beyond the edge")
    with pytest.raises(AssertionError):
        assert_nothing_is_clipped(figure)
    figure = plots.curves(HISTORY, "Training")
    figure.axes[0].set_xticks([1, 1.01], ["one", "two"])
    with pytest.raises(AssertionError, match="run into each other"):
        assert_nothing_is_clipped(figure)


# --- curves

HISTORY = [
    {"epoch": 1, "train_loss": 0.9, "train_accuracy": 0.7, "validation_loss": 0.5, "validation_accuracy": 0.8},
    {"epoch": 2, "train_loss": 0.4, "train_accuracy": 0.85, "validation_loss": 0.3, "validation_accuracy": 0.9},
    {"epoch": 3, "train_loss": 0.2, "train_accuracy": 0.95, "validation_loss": 0.35, "validation_accuracy": 0.88},
]


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}


def test_curves_show_each_epoch_of_training_and_validation():
    figure = plots.curves(HISTORY, "Training")
    loss, accuracy = figure.axes
    assert lines(loss) == {
        "training, last 0.2000": [(1, 0.9), (2, 0.4), (3, 0.2)],
        "validation, last 0.3500": [(1, 0.5), (2, 0.3), (3, 0.35)],
    }
    assert lines(accuracy) == {
        "training, last 95.00%": [(1, 0.7), (2, 0.85), (3, 0.95)],
        "validation, last 88.00%": [(1, 0.8), (2, 0.9), (3, 0.88)],
    }
    for axes in figure.axes:
        one, other = axes.lines
        assert one.get_linestyle() != other.get_linestyle()  # not by colour alone
        (low, high), points = axes.get_ylim(), [y for line in axes.lines for y in line.get_ydata()]
        assert low < min(points)
        assert max(points) < high
    assert_nothing_is_clipped(figure)
    assert {"epoch", "accuracy", "Training"} <= set(texts(figure))


@pytest.mark.parametrize("epochs", [1, 2, 100])
def test_curves_of_few_and_many_epochs(epochs):
    figure = plots.curves([{"epoch": i + 1, "train_loss": 1 / (i + 1)} for i in range(epochs)], "Training")
    assert_nothing_is_clipped(figure)
    (line,) = figure.axes[0].lines
    assert len(line.get_xdata()) == epochs
    ticks = [tick for tick in figure.axes[0].get_xticks() if 0.5 <= tick <= epochs + 0.5]
    assert ticks
    assert all(tick == int(tick) for tick in ticks)
    assert (line.get_marker() == "") == (epochs == 100)  # a single point without a marker would not be seen


def test_what_was_not_measured_is_not_drawn():
    figure = plots.curves(
        [{**row, "validation_loss": None, "validation_accuracy": None} for row in HISTORY], "Training"
    )
    assert [line.get_label() for line in figure.axes[0].lines] == ["training, last 0.2000"]
    diverged = plots.curves([{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": float("nan")}], "Training")
    assert "training, last nan" in texts(diverged)
    assert_nothing_is_clipped(diverged)


# --- what the network said


def test_the_confusion_matrix_counts_and_colours_the_mistakes():
    confusion = np.zeros((10, 10), np.int64)
    np.fill_diagonal(confusion, 90)
    confusion[2, 6], confusion[2, 0], confusion[9, 7] = 20, 5, 1234
    figure = plots.confusion_matrix(confusion, LABELS, "Confusion")
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    assert shown.mask.diagonal().all()
    assert shown[2, 6] == pytest.approx(20 / 115)
    assert shown[9, 7] == pytest.approx(1234 / 1324)
    assert shown.max() == axes.images[0].norm.vmax
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(i, i): "90" for i in range(10)} | {(6, 2): "20", (0, 2): "5", (7, 9): "1,234"}
    assert [label.get_text() for label in axes.get_xticklabels()] == list(LABELS)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(LABELS)
    assert any(text.startswith("Confusion\n900 of 2,159 right: 41.69%, 95 % interval 39.") for text in texts(figure))
    assert_nothing_is_clipped(figure)


def test_numbers_can_be_read_on_their_cells():
    """The text differs from its background by the ratio that WCAG 2 wants, 4.5 to 1."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    confusion = np.arange(1, 101).reshape(10, 10)
    confusion[np.diag_indices(10)] = 1000 - (confusion.sum(axis=1) - confusion.diagonal())  # rows of 1000
    axes = plots.confusion_matrix(confusion, LABELS, "Confusion").axes[0]
    picture, inks = axes.images[0], set()
    for text in axes.texts:
        column, row = text.get_position()
        inks.add(text.get_color())
        if row != column:
            behind = luminance(picture.cmap(picture.norm(confusion[row, column] / 1000)))
            ink = {"white": 1.0, "black": 0.0}[text.get_color()]
            assert (max(behind, ink) + 0.05) / (min(behind, ink) + 0.05) > 4.5, text
    assert inks == {"white", "black"}


def test_a_network_without_mistakes_has_a_picture_too():
    confusion = np.diag(np.full(10, 15))
    assert_nothing_is_clipped(plots.confusion_matrix(confusion, DIGITS, "Confusion"))
    sure = np.eye(10, dtype=np.float32)
    figure = plots.worst_mistakes(np.zeros((10, 1, 28, 28), np.uint8), np.arange(10), sure, DIGITS, "Worst")
    assert "Worst\n0 of 10 images misread" in texts(figure)
    assert not any(axes.images or axes.axison for axes in figure.axes)
    assert_nothing_is_clipped(figure)


def test_the_worst_mistakes_come_first_with_both_labels(sample, probabilities):
    images, truth = sample[1].images.numpy(), sample[1].labels.numpy()
    figure = plots.worst_mistakes(images, truth, probabilities, LABELS, "Worst")
    wrong = [i for i in range(150) if probabilities[i].argmax() != truth[i]]
    wrong.sort(key=lambda i: probabilities[i, truth[i]])
    assert len(wrong) > 20
    assert f"Worst\n{len(wrong)} of 150 images misread, the worst 20 shown" in texts(figure)
    assert len(figure.axes) == 20
    for axes, index in zip(figure.axes, wrong, strict=False):
        assert np.array_equal(axes.images[0].get_array(), images[index, 0])
        said = probabilities[index].argmax()
        assert axes.get_title() == (
            f"image {index}\ntrue: {LABELS[truth[index]]}\nsaid: {LABELS[said]}, {probabilities[index, said]:.1%}"
        )
    assert_nothing_is_clipped(figure)


def test_three_mistakes_take_three_places(sample, probabilities):
    images, truth = sample[1].images.numpy(), probabilities.argmax(axis=1).copy()
    truth[[4, 50, 149]] = (truth[[4, 50, 149]] + 1) % 10
    figure = plots.worst_mistakes(images, truth, probabilities, LABELS, "Worst")
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert sorted(int(re.match(r"image (\d+)", title)[1]) for title in titles) == [4, 50, 149]
    assert_nothing_is_clipped(figure)


def test_reliability_shows_each_bin_where_it_is(sample, probabilities):
    truth = sample[1].labels.numpy()
    calibration = scores.calibration(probabilities, truth)
    figure = plots.reliability(calibration, "Reliability")
    above, below = figure.axes
    points = [tuple(point) for line in above.lines if line.get_marker() == "o" for point in line.get_xydata()]
    sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    want, counts = [], []
    for index in range(15):
        inside = (sure >= index / 15) & (sure < (index + 1) / 15)
        counts.append(int(inside.sum()))
        if inside.any():
            want.append((sure[inside].astype(float).mean(), right[inside].mean()))
    np.testing.assert_allclose(points, want, rtol=1e-6)
    assert [bar.get_height() for bar in below.patches] == counts
    assert [bar.get_center()[0] for bar in below.patches] == pytest.approx([(i + 0.5) / 15 for i in range(15)])
    (bars,) = above.collections[0].get_segments()[:1]
    low, high = scores.wilson(round(want[0][1] * next(filter(None, counts))), next(filter(None, counts)))
    assert bars[:, 1].tolist() == pytest.approx([low, high])
    assert f"Reliability\nexpected calibration error {calibration.error:.2%}, 150 images" in texts(figure)
    assert_nothing_is_clipped(figure)


# --- what the layers hold


def test_feature_maps_are_what_each_convolution_answers(sample):
    network, image = deep(), sample[1].images[0]
    maps = features.feature_maps(network, image)
    assert list(maps) == ["layers.0", "layers.2", "layers.4"]
    with torch.no_grad():
        first = nn.functional.conv2d(image[None] / 255, network.layers[0].weight, network.layers[0].bias, stride=2)[0]
        second = nn.functional.conv2d(first[None].relu(), network.layers[2].weight, network.layers[2].bias, stride=2)[0]
    torch.testing.assert_close(maps["layers.0"], first)
    torch.testing.assert_close(maps["layers.2"], second)
    assert maps["layers.4"].shape == (70, 1, 1)
    assert not any(module._forward_hooks for module in network.modules())


def test_hooks_are_taken_off_when_the_network_fails(sample):
    network = Small(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(5, 10))
    with pytest.raises(RuntimeError):
        features.feature_maps(network, sample[1].images[0])
    assert not any(module._forward_hooks for module in network.modules())


def test_the_picture_of_the_maps_shows_each_at_its_number(sample):
    network, image = deep(), sample[1].images[3]
    maps = {name: found.numpy() for name, found in features.feature_maps(network, image).items()}
    probabilities = softmax(predict(network, image[None]).numpy())[0]
    figure = plots.feature_maps(image[0].numpy(), probabilities, LABELS, maps, "Maps")
    assert_nothing_is_clipped(figure)
    picture, bars, *layers = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert np.array_equal(picture.images[0].get_array(), image[0].numpy())
    assert [bar.get_height() for bar in bars.patches] == pytest.approx(probabilities.tolist())
    assert [axes.get_title(loc="left") for axes in layers] == [
        "layers.0: 8 maps of 12 × 12, before the activation",
        "layers.2: 20 maps of 5 × 5, before the activation",
        "layers.4: 70 maps of 1 × 1, the first 64, before the activation",
    ]
    for axes, found in zip(layers, maps.values(), strict=True):
        shown = axes.images[0].get_array()
        columns = {round(x): int(t.get_text()) for x, t in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
        rows = {round(y): int(t.get_text()) for y, t in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
        numbers = []
        for y, row in rows.items():
            for x, column in columns.items():
                if row + column < min(64, len(found)):
                    numbers.append(row + column)
                    scale = max(1, 24 // found.shape[1])
                    top, left = y - scale * found.shape[1] // 2, x - scale * found.shape[2] // 2
                    tile = shown[top : top + scale * found.shape[1], left : left + scale * found.shape[2]]
                    np.testing.assert_array_equal(tile[::scale, ::scale], found[row + column])
        assert numbers == list(range(min(64, len(found))))


def test_a_mosaic_has_gaps_of_nothing():
    tiles = np.arange(3 * 24 * 24, dtype=np.float32).reshape(3, 24, 24)
    joined = plots.mosaic(tiles, 2)
    assert joined.shape == (50, 50)
    assert np.array_equal(joined[:24, 26:], tiles[1])
    assert np.isnan(joined[24:26]).all()
    assert np.isnan(joined[26:, 24:]).all()


def test_first_filters_are_the_first_layers_weights():
    network = deep()
    filters = features.first_filters(network)
    assert torch.equal(filters, network.layers[0].weight[:, 0])
    assert not filters.requires_grad
    perceptron = flat()
    assert torch.equal(features.first_filters(perceptron)[5, 3], perceptron.layers[1].weight[5, 84:112])
    assert features.first_filters(Small(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10))) is None


def test_the_picture_of_the_filters_has_one_scale_around_zero(subject):
    filters = features.first_filters(subject.network).numpy()
    figure = plots.first_layer_filters(filters, "First layer")
    axes = figure.axes[0]
    picture = axes.images[0]
    assert picture.norm.vmin == -picture.norm.vmax
    assert picture.norm.vmax == pytest.approx(np.percentile(np.abs(filters), 99.5))
    np.testing.assert_array_equal(picture.get_array()[:24:8, :24:8], filters[0])
    assert axes.get_title(loc="left") == "32 filters of 3 × 3"
    assert_nothing_is_clipped(figure)


# --- all of them, and the files


def test_every_picture_of_a_network_is_whole(subject, sample):
    found = dict(pictures.figures(subject, sample[1], [0, 7]))
    assert list(found) == [
        "curves",
        "confusion-matrix",
        "worst-mistakes",
        "reliability",
        "first-layer-filters",
        "feature-maps-0",
        "feature-maps-7",
    ]
    for figure in found.values():
        assert_nothing_is_clipped(figure)
        assert any("net.pt" in text for text in texts(figure))
    assert f"Test image 7 of class {LABELS[sample[1].labels[7]]} in net.pt" in texts(found["feature-maps-7"])


def test_what_a_network_does_not_have_is_left_out(subject, sample):
    other = replace(subject, network=flat(), history=())
    found = dict(pictures.figures(other, sample[1], [0]))
    assert list(found) == ["confusion-matrix", "worst-mistakes", "reliability", "first-layer-filters"]
    for figure in found.values():
        assert_nothing_is_clipped(figure)


@pytest.mark.parametrize("index", [-1, 150])
def test_an_image_that_is_not_there_is_refused_before_anything_is_drawn(subject, sample, tmp_path, index):
    folder = tmp_path / "plots"
    with pytest.raises(ValueError, match=f"--images: got {index}, want 0 to 149"):
        pictures.write(folder, pictures.figures(subject, sample[1], [0, index]))
    assert not folder.exists()


def test_files_are_pngs_of_the_figures(subject, sample, tmp_path):
    folder = tmp_path / "deep" / "plots"
    paths = pictures.write(folder, pictures.figures(subject, sample[1], []))
    assert sorted(folder.iterdir()) == sorted(paths)
    for path, (name, figure) in zip(paths, pictures.figures(subject, sample[1], []), strict=True):
        assert path.name == f"{name}.png"
        with Image.open(path) as image:
            assert image.format == "PNG"
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), plots.raster(figure))
    again = pictures.write(folder, pictures.figures(replace(subject, history=()), sample[1], []))
    assert again == paths[1:]  # in the place of what was there
    assert sorted(folder.iterdir()) == sorted(paths)


def test_pictures_of_a_version_go_beside_it_and_leave_it_as_it_was(tampered, sample):
    version = tampered / MODEL / "1"
    before = {path.name: path.read_bytes() for path in version.iterdir()}
    subject = pictures.of_bundle(open_bundle(version))
    assert subject.folder == tampered / MODEL / "plots" / "1"
    assert subject.name == f"{MODEL} version 1"
    assert len(subject.history) == 4
    pictures.write(subject.folder, pictures.figures(subject, sample[1], []))
    assert {path.name: path.read_bytes() for path in version.iterdir()} == before
    (version.parent / "latest").symlink_to("1")
    assert pictures.of_bundle(open_bundle(version.parent / "latest")).folder == subject.folder
    files = json.loads((version / MANIFEST).read_text())["files"]
    del files["history.json"]
    edit_manifest(version, files=files)
    assert pictures.of_bundle(open_bundle(version)).history == ()


def test_drawing_uses_no_pyplot():
    code = "import sys, trainer.pictures; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- the command


def command(
    *words: object, code: str = "import trainer.__main__ as m; sys.exit(m.main())", without: str = ""
) -> object:
    """Run a Python program, in which importing `without` fails."""
    start = f"import sys; sys.modules[{without!r}] = None; " if without else "import sys; "
    return subprocess.run(
        [sys.executable, "-c", start + code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        ([], 2, "one of the arguments --bundle --checkpoint is required"),
        (["--bundle", "a", "--checkpoint", "b"], 2, "not allowed with argument --bundle"),
        (["--checkpoint", "a", "--images", "1,b"], 2, "--images: got '1,b', want numbers with commas between"),
        (["--bundle", "nowhere"], 1, "nowhere: neither a version nor a model with versions"),
        (["--checkpoint", "none.pt"], 1, "none.pt is missing"),
    ],
)
def test_a_wrong_command_says_what_is_wrong(words, code, problem, capsys):
    found, errors = trainer_here(["plots", *words], capsys)
    assert found == code
    assert problem in errors
    assert "Traceback" not in errors


def test_without_matplotlib_the_extra_is_named(bundle):
    done = command("plots", "--bundle", bundle.path, without="matplotlib")
    assert done.returncode == 1
    assert done.stderr.startswith("error: pictures need matplotlib (")
    assert "pip install 'parityserve[plots]'" in done.stderr


def test_an_export_draws_beside_what_it_published(tampered, sample, capsys):
    trainer.commands.export._draw_beside(open_bundle(tampered / MODEL / "1"), sample[1])
    names = {path.name for path in (tampered / MODEL / "plots" / "1").iterdir()}
    assert {"curves.png", "feature-maps-0.png", "feature-maps-1.png", "feature-maps-2.png"} <= names
    assert "pictures: " in capsys.readouterr().out


def test_an_export_without_matplotlib_is_complete_and_says_what_it_lacks(bundle):
    code = (
        "from pathlib import Path; import trainer.commands.export as m; from serving.bundle import open_bundle; "
        "m._draw_beside(open_bundle(Path(sys.argv[1])), None)"
    )
    done = command(bundle.path, code=code, without="matplotlib")
    assert done.returncode == 0, done.stderr
    assert "no pictures were drawn: pictures need matplotlib" in done.stdout
    assert done.stdout.endswith(": pip install 'parityserve[plots]'\n")


def test_the_documents_commands_are_accepted_and_its_pictures_are_there():
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m trainer (.+)$", text, re.MULTILINE)
    assert len(commands) >= 3
    for words in commands:
        trainer.__main__.parser().parse_args(shlex.split(words))  # exits when they are not
    shown = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(shown) == 6
    for picture in shown:
        with Image.open(ROOT / "docs" / picture) as image:
            assert image.format == "PNG"


@pytest.mark.data
def test_the_command_draws_a_checkpoint_beside_it(data_dir, checkpoint, tmp_path):
    saved = tmp_path / "net.pt"
    checkpoints.save(replace(checkpoint, history=[]), saved)
    done = command("plots", "--checkpoint", saved, "--images", "9999")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "net-plots").iterdir()}
    assert "feature-maps-9999.png" in names
    assert "curves.png" not in names
    assert "no curves" in done.stdout
