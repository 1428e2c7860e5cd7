"""Metrics over the steps of all segments, of one run and of several."""

from __future__ import annotations

from collections.abc import Sequence

from chainrun.report import look
from chainrun.report.curves import Curve, Metrics
from chainrun.report.endings import KINDS
from chainrun.report.figure import FAINT, INK, Axes, Canvas, dates, day
from chainrun.report.story import Story
from chainrun.report.timeline import MOST_ROWS, bars, legend, on_calendar

MOST_CURVES = 12


def height(metrics: Metrics) -> float:
    """Return the inches that the metrics need; 0 where there are none."""
    drawn = min(len(metrics.curves), MOST_CURVES)
    return 0.0 if not drawn else 3.2 if drawn == 1 else 2.3 * -(-drawn // 2) + 0.4


def draw(canvas: Canvas, found: Metrics, story: Story) -> None:
    """Draw the metrics over the steps of all segments, with the cuts marked."""
    curves = found.curves[:MOST_CURVES]
    thin = 1.0 if len(story.cuts) <= 20 else 0.45
    columns = 1 if len(curves) == 1 else 2
    rows = -(-len(curves) // columns)
    total = height(found)
    grid = canvas.add_gridspec(
        rows,
        columns,
        left=0.085,
        right=0.98,
        top=1 - 0.35 / total,
        bottom=0.5 / total,
        hspace=0.5,
        wspace=0.16,
    )
    for index, curve in enumerate(curves):
        axes = canvas.add_subplot(grid[index // columns, index % columns])
        _curve(axes, curve, look.CURVES[0])
        for step, before in story.cuts:
            axes.axvline(
                step,
                color=KINDS[before.ending.kind],
                linewidth=0.8,
                linestyle=(0, (3, 2)),
                zorder=0,
                alpha=thin,
            )
        axes.set_title(look.clean(curve.name, 50), fontsize=9, loc="left", fontweight="bold")
        axes.set_xlim(0, max([1, story.steps, *(each.until for each in curves)]) * 1.01)
        if index + columns >= len(curves):
            axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=7)


def _curve(axes: Axes, curve: Curve, colour: str, label: str | None = None) -> None:
    steps, means, lows, highs = curve.points()
    # the band first, so that the mean is seen on it; a bucket of one step has none
    if curve.width > 1:
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.22, linewidth=0)
    dots = {"marker": "o", "markersize": 2.5} if len(steps) <= 40 else {}
    axes.plot(steps, means, color=colour, linewidth=1.2, label=label, **dots)
    if not steps:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=FAINT)
    elif curve.first_not_finite is not None:
        axes.plot(
            [curve.first_not_finite],
            [0.04],
            "x",
            color="#d64545",
            transform=axes.get_xaxis_transform(),
            markersize=6,
        )
    axes.grid(True, axis="y")
    axes.margins(y=0.08)


def overview_height(stories: Sequence[Story], names: Sequence[str]) -> float:
    """Return the inches that the figure of several runs needs."""
    drawn = min(len(names), 4)
    return 1.15 + 0.26 * min(len(stories), MOST_ROWS) + (2.6 * -(-drawn // 2) + 0.9 if drawn else 0.0)


def overview(
    canvas: Canvas, stories: Sequence[Story], found: Sequence[Metrics], names: Sequence[str]
) -> None:
    """Draw several runs against the calendar, and the metrics that most of them have."""
    shown, drawn = list(stories)[:MOST_ROWS], list(names)[:4]
    total = overview_height(stories, names)
    tall = 0.26 * len(shown)
    strip = canvas.add_axes((0.2, (total - 0.65 - tall) / total, 0.7, tall / total))

    for index, story in enumerate(shown):
        strip.text(1.01, index, story.state, va="center", fontsize=8, transform=strip.get_yaxis_transform())
    rows_of = [(index, on_calendar(s)) for index, story in enumerate(shown) for s in story.segments]
    bars(strip, rows_of, 0.72)
    first = min((story.began for story in shown), default=0.0)
    last = max([story.ended for story in shown] + [first + 1])
    strip.set_xlim(day(first - 0.01 * (last - first)), day(last + 0.01 * (last - first)))
    strip.set_ylim(len(shown) - 0.4, -0.6)
    strip.set_yticks(range(len(shown)), [look.clean(story.name, 26) for story in shown], fontsize=8)
    for index, label in enumerate(strip.get_yticklabels()):
        label.set_color(look.CURVES[index % len(look.CURVES)] if len(shown) <= len(look.CURVES) else INK)
    strip.tick_params(axis="y", length=0)
    dates(strip)
    strip.grid(True, axis="x")
    for story in shown[:1]:
        merged = Story(**{**vars(story), "segments": [s for each in shown for s in each.segments]})
        legend(canvas, merged, total)
    if not drawn:
        return
    columns = 1 if len(drawn) == 1 else 2
    rows = -(-len(drawn) // columns)
    below = (total - 0.65 - tall - 0.85) / total
    grid = canvas.add_gridspec(
        rows, columns, left=0.085, right=0.98, top=below, bottom=0.5 / total, hspace=0.45, wspace=0.16
    )
    for place, name in enumerate(drawn):
        axes = canvas.add_subplot(grid[place // columns, place % columns])
        for index, metrics_of in enumerate(found[: len(shown)]):
            for curve in metrics_of.curves:
                if curve.name == name:
                    _curve(axes, curve, look.CURVES[index % len(look.CURVES)])
        axes.set_title(look.clean(name, 50), fontsize=9, loc="left", fontweight="bold")
        if place + columns >= len(drawn):
            axes.set_xlabel("step")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=7)
