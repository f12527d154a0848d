"""Pictures of a search: what its trials gave, and which options mattered. Numbers in, figures out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from trainer.plots import BLUE, GREY, VERMILION, new_figure
from trainer.search import Outcome

GREEN = "#009E73"  # of the same palette


def history(outcomes: Sequence[Outcome], title: str) -> Figure:
    """The accuracy of every trial by its number, and the best until then.

    Trials that are far below the others would press these together: they stand on the lower edge, as triangles.

    Args:
        outcomes: with one that has finished at least, by number.
        title: of the picture.
    """
    finished = [(outcome.number, outcome.accuracy or 0.0) for outcome in outcomes if outcome.state == "finished"]
    pruned = [(outcome.number, outcome.accuracy or 0.0) for outcome in outcomes if outcome.state == "pruned"]
    without = [outcome.number for outcome in outcomes if outcome.state in ("refused", "failed")]
    low, high = _limits([accuracy for _, accuracy in finished])
    figure = new_figure(10, 5, f"{title}\n{_count(outcomes)}")
    axes = figure.add_subplot()
    last = outcomes[-1].number
    best, steps = 0.0, []
    for number, accuracy in finished:
        best = max(best, accuracy)
        steps.append((number, best))
    axes.step(*zip(*[*steps, (last + 0.5, best)], strict=True), where="post", color=GREEN, label=f"best, {best:.2%}")
    kinds = ((finished, "trained to the end", BLUE, "o"), (pruned, "pruned, at its last epoch", VERMILION, "X"))
    for points, label, colour, marker in kinds:
        above = [point for point in points if point[1] >= low]
        if points:  # for the legend, too, where all of them are below
            axes.plot(
                *_columns(above), linestyle="", marker=marker, markersize=8, color=colour, label=label, mec="white"
            )
        below = [number for number, accuracy in points if accuracy < low]
        if below:  # drawn unclipped, an empty line would take its place at the picture's corner
            axes.plot(below, [low] * len(below), linestyle="", marker="v", color=colour, clip_on=False, zorder=5)
    if any(accuracy < low for _, accuracy in finished + pruned):
        axes.plot([], [], linestyle="", marker="v", color=GREY, label="below the picture")
    if without:
        axes.plot(without, [low] * len(without), linestyle="", marker="|", markersize=14, color=GREY)
        axes.plot([], [], linestyle="", marker="|", markersize=10, color=GREY, label="refused or failed")
    axes.set(xlabel="trial", ylabel="validation accuracy", xlim=(-0.5, last + 0.5), ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, columnspacing=1.5, handlelength=1.5)
    return figure


def importance(parts: Mapping[str, float], best: int, finished: int, title: str) -> Figure:
    """How much each option decides whether a trial is among the `best` of those that finished, in parts of 1."""
    figure = new_figure(
        8,
        1.7 + 0.4 * len(parts),
        f"{title}\nwhat decides whether a trial is among the best {best} of {finished} (PED-ANOVA)",
    )
    axes = figure.add_subplot()
    ordered = sorted(parts.items(), key=lambda item: item[1])
    bars = axes.barh([name for name, _ in ordered], [part for _, part in ordered], color=BLUE)
    axes.bar_label(bars, [f"{part:.1%}" for _, part in ordered], padding=4)
    axes.set(xlabel="importance", xlim=(0, 1.12 * ordered[-1][1]))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def _limits(accuracies: Sequence[float]) -> tuple[float, float]:
    """The part of the axis that has the better half of the trials, and as much again below."""
    ordered = sorted(accuracies, reverse=True)
    best, median = ordered[0], ordered[len(ordered) // 2]
    room = max(best - median, 0.002)
    return max(0.0, max(ordered[-1] - 0.3 * room, median - 3 * room)), best + 0.3 * room


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [number for number, _ in points], [accuracy for _, accuracy in points]


def _count(outcomes: Sequence[Outcome]) -> str:
    states = [outcome.state for outcome in outcomes]
    told = {"finished": "trained to the end", "pruned": "pruned", "refused": "refused", "failed": "failed"}
    return f"{len(states)} trial{'s' * (len(states) > 1)}: " + ", ".join(
        f"{states.count(state)} {text}" for state, text in told.items() if state in states
    )
