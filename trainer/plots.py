"""Pictures of a trained network: how it was trained, where it errs, what its layers see, how far its word can be taken.

Arrays in, figures out; `trainer/pictures.py` has the arrays. They are drawn without pyplot, which would keep figures
and settings for the whole process. Colours and colour maps are told apart with any colour vision.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from serving.errors import ParityserveError
from trainer import scores
from trainer.scores import Calibration, Counts, Floats

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter
except ImportError as error:
    raise ParityserveError(f"pictures need matplotlib ({error}): pip install 'parityserve[plots]'") from error

History = Sequence[Mapping[str, float | None]]  # one entry an epoch, as checkpoints have it; None: not measured

DPI = 100
# Of Okabe and Ito's palette: https://jfly.uni-koeln.de/color/
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#777777"
SIGNED = "PuOr"  # white at zero
DARK = 0.765  # of Oranges: from there on white is read better than black

MISTAKES_ROWS, MISTAKES_COLUMNS = 4, 5
MAPS_SHOWN, MAPS_COLUMNS = 64, 16
TILE, GAP = 24, 2  # pixels: maps smaller than a tile are enlarged to about it, so that the gap is as thin for all


def raster(figure: Figure) -> npt.NDArray[np.uint8]:
    """A figure as it is drawn, uint8 [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]  # matplotlib gives these methods no types
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[no-untyped-call]


def curves(history: History, title: str) -> Figure:
    """Loss and accuracy of every epoch, in training and validation as far as the history has them."""
    figure = new_figure(10, 4.4, title)
    loss, accuracy = figure.subplots(1, 2)
    parts = [("train", "training", BLUE, "o", "-"), ("validation", "validation", VERMILION, "s", "--")]
    epochs = range(1, len(history) + 1)
    for axes, measure, form in ((loss, "loss", "{:.4f}"), (accuracy, "accuracy", "{:.2%}")):
        for key, label, colour, marker, dash in parts:
            values = [row.get(f"{key}_{measure}") for row in history]
            points = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
            if points:
                last = form.format(points[-1][1])
                style = {"color": colour, "linestyle": dash, "marker": marker if len(points) <= 30 else ""}
                axes.plot(*zip(*points, strict=True), label=f"{label}, last {last}", **style)
        axes.set(xlabel="epoch", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    loss.update_datalim([(epochs[0], 0)])
    loss.autoscale_view()
    loss.set(ylabel="loss: cross-entropy, nats", ylim=(0, None))
    accuracy.set(ylabel="accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def confusion_matrix(confusion: Counts, labels: Sequence[str], title: str) -> Figure:
    """Counts by true and predicted class [classes, classes]; the colour is of the mistakes alone, by their share."""
    right, n = int(confusion.trace()), int(confusion.sum())
    low, high = scores.wilson(right, n)
    figure = new_figure(
        9, 8, f"{title}\n{right:,} of {n:,} right: {right / n:.2%}, 95 % interval {low:.2%} to {high:.2%}"
    )
    axes = figure.add_subplot()
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    mistakes = np.ma.masked_array(share, mask=np.eye(len(labels), dtype=bool))
    axes.set_facecolor("#DDDDDD")  # of the diagonal
    most = float(mistakes.max()) or 1.0
    picture = axes.imshow(mistakes, cmap="Oranges", vmin=0, vmax=most)
    figure.colorbar(picture, label="share of the true class's images", format=PercentFormatter(1), shrink=0.8)
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            dark = row != column and share[row, column] > DARK * most
            axes.text(column, row, f"{count:,}", ha="center", va="center", color="white" if dark else "black")
    axes.set(xlabel="what the network said", ylabel="true class")
    _name_columns(axes, labels)
    axes.set_yticks(range(len(labels)), labels)
    return figure


def worst_mistakes(
    images: npt.NDArray[np.uint8],
    truth: npt.NDArray[np.integer],
    probabilities: Floats,
    labels: Sequence[str],
    title: str,
) -> Figure:
    """The misread images whose true class was given the least probability, the worst first.

    Args:
        images: uint8 [N, 1, 28, 28].
        truth: true classes [N].
        probabilities: [N, classes].
        labels: the classes' names.
        title: of the picture.
    """
    said = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(said != truth)
    order = wrong[np.argsort(probabilities[wrong, truth[wrong]], kind="stable")]
    shown = order[: MISTAKES_ROWS * MISTAKES_COLUMNS]
    count = f"{len(wrong):,} of {len(truth):,} images misread"
    if len(shown):
        count += f", the worst {len(shown)} shown"
    rows = max(1, -(-len(shown) // MISTAKES_COLUMNS))
    figure = new_figure(10, 1 + 2.3 * rows, f"{title}\n{count}")
    for axes in figure.subplots(rows, MISTAKES_COLUMNS, squeeze=False).flat:
        axes.set_axis_off()
    for axes, index in zip(figure.axes, shown, strict=False):
        _image(axes, images[index, 0])
        axes.set_title(
            f"image {index}\ntrue: {labels[truth[index]]}\n"
            f"said: {labels[said[index]]}, {probabilities[index, said[index]]:.1%}",
            fontsize=10,
        )
    return figure


def reliability(calibration: Calibration, title: str) -> Figure:
    """How often the network is right against how sure it says it is, and how many images each bin holds."""
    n = int(calibration.counts.sum())
    figure = new_figure(7.5, 8, f"{title}\nexpected calibration error {calibration.error:.2%}, {n:,} images")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bins = len(calibration.counts)
    filled = calibration.counts > 0
    right, counts = calibration.right[filled].tolist(), calibration.counts[filled].tolist()
    accuracy = calibration.accuracy[filled]
    intervals = np.array([scores.wilson(*pair) for pair in zip(right, counts, strict=True)]).T
    ends = np.abs(intervals - accuracy)
    style = {"color": BLUE, "marker": "o", "capsize": 3}
    above.plot(
        [0, 1], [0, 1], color=GREY, linestyle="--", label="as sure as right; above, right more often than it says"
    )
    above.errorbar(calibration.confidence[filled], accuracy, ends, label="network, 95 % interval", **style)
    above.set(ylabel="fraction of them right", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", frameon=False)
    below.bar((np.arange(bins) + 0.5) / bins, calibration.counts, width=0.92 / bins, color=BLUE)
    below.set(xlabel="probability of the class that it names", ylabel="images", yscale="log", ylim=(0.7, 2 * n))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    above.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def first_layer_filters(filters: Floats, title: str) -> Figure:
    """The filters [filters, height, width] side by side, on one scale."""
    columns = min(8, len(filters))
    rows = -(-min(len(filters), MAPS_SHOWN) // columns)
    figure = new_figure(9, 1.2 + 0.9 * rows, title)
    _tiles(figure.add_subplot(), filters, columns, _shape(filters, "filters"))
    return figure


def feature_maps(
    image: npt.NDArray[np.uint8],
    probabilities: Floats,
    labels: Sequence[str],
    maps: Mapping[str, Floats],
    title: str,
) -> Figure:
    """One image, what the network makes of it, and what each convolution answers, each layer on one scale.

    Args:
        image: uint8 [28, 28].
        probabilities: [classes].
        labels: the classes' names.
        maps: layer's name -> [channels, height, width].
        title: of the picture.
    """
    rows = [-(-min(len(found), MAPS_SHOWN) // MAPS_COLUMNS) for found in maps.values()]
    heights = [2.2, *(0.6 + 0.72 * count for count in rows)]
    figure = new_figure(12, 0.6 + sum(heights), title)
    top, *below = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
    left, right = top.subplots(1, 2, width_ratios=(1, 3))
    _image(left, image)
    left.set_axis_off()
    right.bar(range(len(labels)), probabilities, color=BLUE)
    right.set(title="probabilities", ylim=(0, 1))
    _name_columns(right, labels)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for part, (layer, found) in zip(below, maps.items(), strict=True):
        axes = part.add_subplot()
        _tiles(axes, found, min(MAPS_COLUMNS, len(found)), f"{layer}: {_shape(found, 'maps')}, before the activation")
    return figure


def comparison(
    names: Sequence[str],
    accuracies: Sequence[Sequence[float]],
    costs: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Trainings beside each other: accuracy by seed, mean and deviation, and what each of them costs.

    Args:
        names: of the variants; the first is what the others are compared with.
        accuracies: of each variant, from 0 to 1, one a seed.
        costs: what is measured, with its unit -> one number a variant.
        title: of the picture.
    """
    figure = new_figure(6.5 + 2.6 * len(costs), 1.9 + 0.55 * len(names), title)
    left, *others = figure.subplots(1, 1 + len(costs), sharey=True, width_ratios=(2, *[1] * len(costs)), squeeze=False)[
        0
    ]
    rows = np.arange(len(names))
    means = np.array([np.mean(values) for values in accuracies])
    deviations = np.array([np.std(values, ddof=1) if len(values) > 1 else 0 for values in accuracies])
    left.axvline(means[0], color=GREY, linestyle="--", label="mean of the first")
    for row, values in zip(rows, accuracies, strict=True):
        label = "one seed" if row == 0 else None
        left.plot(values, [row + 0.22] * len(values), color=VERMILION, marker="o", alpha=0.7, ls="", ms=5, label=label)
    style = {"color": BLUE, "marker": "s", "capsize": 4, "linestyle": ""}
    left.errorbar(
        means, rows - 0.1, xerr=deviations, label="mean" + " ± standard deviation" * bool(deviations.any()), **style
    )
    left.set(xlabel="validation accuracy", ylim=(len(names) - 0.4, -0.6))  # the first on top
    left.set_yticks(rows, ["\n".join(textwrap.wrap(name, 26)) for name in names])
    left.xaxis.set_major_formatter(PercentFormatter(1))
    left.xaxis.set_major_locator(MaxNLocator(5))
    left.grid(alpha=0.3, axis="x")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    for axes, (what, values) in zip(others, costs.items(), strict=True):
        axes.barh(rows, values, height=0.5, color=BLUE)
        for row, value in zip(rows, values, strict=True):
            axes.annotate(_figures(value), (value, row), (3, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set(xlabel=what, xlim=(0, 1.45 * max(values)))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.tick_params(axis="y", length=0)
    return figure


def _figures(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mosaic(tiles: Floats, columns: int) -> Floats:
    """Tiles [N, height, width] in rows of `columns`, enlarged by a whole number; nan between and after them."""
    scale = max(1, TILE // tiles.shape[1])
    tiles = np.repeat(np.repeat(tiles, scale, axis=1), scale, axis=2)
    count, height, width = tiles.shape
    rows = -(-count // columns)
    padded = np.full((rows * columns, height + GAP, width + GAP), np.nan, tiles.dtype)
    padded[:count, :height, :width] = tiles
    joined = padded.reshape(rows, columns, height + GAP, width + GAP).swapaxes(1, 2)
    return joined.reshape(rows * (height + GAP), columns * (width + GAP))[:-GAP, :-GAP]


def _tiles(axes: Axes, tiles: Floats, columns: int, title: str) -> None:
    """Draw tiles in rows of `columns`; the number of a tile is that of its row and that of its column together."""
    tiles = tiles[:MAPS_SHOWN]
    joined = mosaic(tiles, columns)
    # A few outliers would make all else pale: the largest half percent share the last colour, as the bar's tips say.
    limit = max(float(np.percentile(np.abs(tiles), 99.5)), 1e-9)
    picture = axes.imshow(joined, cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
    figure = axes.get_figure(root=True)
    assert figure is not None, "these axes are in a figure"
    beside = axes.inset_axes((1.012, 0, 0.014, 1))  # of axes: as high as the tiles, whatever their number
    figure.colorbar(picture, cax=beside, extend="both")
    rows = -(-len(tiles) // columns)
    height, width = (joined.shape[0] + GAP) / rows, (joined.shape[1] + GAP) / columns
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xticks((np.arange(columns) + 0.5) * width - GAP / 2 - 0.5, [f"+{i}" for i in range(columns)])
    axes.set_yticks((np.arange(rows) + 0.5) * height - GAP / 2 - 0.5, [str(row * columns) for row in range(rows)])
    axes.tick_params(length=0)
    axes.set_anchor("W")  # layers with fewer maps begin where the others do
    axes.spines[:].set_visible(False)


def _shape(tiles: Floats, what: str) -> str:
    count, height, width = tiles.shape
    return f"{count} {what} of {height} × {width}" + (f", the first {MAPS_SHOWN}" if count > MAPS_SHOWN else "")


def _name_columns(axes: Axes, labels: Sequence[str]) -> None:
    if max(map(len, labels)) > 3:  # would run into each other
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
    else:
        axes.set_xticks(range(len(labels)), labels)


def _image(axes: Axes, image: npt.NDArray[np.uint8]) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def new_figure(width_in: float, height_in: float, title: str) -> Figure:
    """An empty picture with a title."""
    figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=13)
    return figure
