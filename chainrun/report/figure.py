"""What is drawn: the timeline of a run, and its metrics. The same code makes the page's SVG and the PNG."""

from __future__ import annotations

import io
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainrun.errors import UsageError
from chainrun.report import look
from chainrun.report.curves import Curve, Metrics
from chainrun.report.endings import KINDS
from chainrun.report.story import PHASES, Segment, Story

INK, FAINT, PAPER = "#1f2731", "#8b95a1", "#fefefd"  # in the page they become its own colours, dark ones too
WIDTH = 11.0  # inches
MOST_ROWS = 120  # segments in the timeline
MOST_CURVES = 12

Axes = Any
Canvas = Any  # a Figure or a SubFigure


def library() -> Any:
    """Return matplotlib.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise UsageError(
            f"chainrun report draws with matplotlib, which cannot be imported here ({error}); "
            "pip install 'chainrun[report]'"
        ) from None
    return matplotlib


_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "hatch.linewidth": 0.6,
    "path.simplify": True,
}


def timeline_height(story: Story) -> float:
    """Return the inches that the timeline needs."""
    rows = min(len(story.segments), MOST_ROWS)
    return 3.3 + rows * _row(rows)


def _row(rows: int) -> float:
    return 0.27 if rows <= 45 else 0.16


def metrics_height(metrics: Metrics) -> float:
    """Return the inches that the metrics need; 0 where there are none."""
    drawn = min(len(metrics.curves), MOST_CURVES)
    return 0.0 if not drawn else 3.2 if drawn == 1 else 2.3 * -(-drawn // 2) + 0.4


def timeline(canvas: Canvas, story: Story) -> None:
    """Draw all segments: against the calendar, with the steps that they reached, and each by itself."""
    shown = story.segments[-MOST_ROWS:]
    tall = len(shown) * _row(len(shown))
    total = timeline_height(story)
    grid = canvas.add_gridspec(
        3,
        1,
        height_ratios=[0.35, 1.0, max(0.3, tall)],
        hspace=0.0,
        left=0.085,
        right=0.86,
        top=1 - 0.62 / total,
        bottom=0.5 / total,
    )
    strip, steps, rows = (canvas.add_subplot(cell) for cell in grid)
    used = 0.35 + 1.0 + max(0.3, tall)
    scale = (total - 0.62 - 0.5 - 0.85) / used
    place = strip.get_position()
    left, width = place.x0, place.width
    top = total - 0.62
    for axes, height, gap in ((strip, 0.35, 0.05), (steps, 1.0, 0.8), (rows, max(0.3, tall), 0.0)):
        tallness = height * scale
        axes.set_position([left, (top - tallness) / total, width, tallness / total])
        top -= tallness + gap
    _calendar(strip, steps, story)
    _rows(rows, shown, story)
    _legend(canvas, story, total)


def _legend(canvas: Canvas, story: Story, total: float) -> None:
    from matplotlib.patches import Patch

    present = {phase for segment in story.segments for phase, _, _ in segment.phases()}
    handles = [
        Patch(facecolor=look.COLOURS[phase], label=text, **_hatch(phase))
        for phase, text in PHASES.items()
        if phase in present
    ]
    if handles:
        canvas.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0.075, 1 - 0.02 / total),
            ncols=4,
            frameon=False,
            fontsize=8,
            handlelength=1.2,
            handleheight=0.9,
            columnspacing=1.4,
        )


def _hatch(phase: str) -> dict[str, Any]:
    return {"hatch": "////", "edgecolor": PAPER, "linewidth": 0} if phase == "lost" else {"linewidth": 0}


def _bars(axes: Axes, phases: Sequence[tuple[str, float, float]], y: float, height: float) -> None:
    for phase, begin, end in phases:
        axes.broken_barh(
            [(begin, end - begin)], (y - height / 2, height), facecolor=look.COLOURS[phase], **_hatch(phase)
        )


def _day(at: float) -> float:
    """Return a time as matplotlib counts it: local days since 1970."""
    return (at + (time.localtime(at).tm_gmtoff or 0)) / 86400


def _dates(axes: Axes) -> None:
    from matplotlib import dates

    locator = dates.AutoDateLocator(minticks=4, maxticks=9)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]


def _calendar(strip: Axes, steps: Axes, story: Story) -> None:
    for segment in story.segments:
        phases = [(phase, _day(begin), _day(end)) for phase, begin, end in segment.phases()]
        _bars(strip, phases, 0.5, 1.0)
    first, last = story.began, max(story.ended, story.began + 1)
    room = 0.01 * (last - first)
    for axes in (strip, steps):
        axes.set_xlim(_day(first - room), _day(last + room))
    strip.set_ylim(0, 1)
    strip.set_yticks([0.5], ["all"])
    strip.tick_params(length=0, labelbottom=False)
    for side in ("left", "bottom"):
        strip.spines[side].set_visible(False)
    for segment in story.segments:
        if segment.number is None or segment.trains is None:
            continue
        known = [(segment.trains, segment.from_step)]
        known += [(one.captured, one.step) for one in segment.checkpoints]
        known.append((segment.last_boundary, segment.to_step))
        known.sort()
        x, y = [_day(at) for at, _ in known], [step for _, step in known]
        steps.plot(x, y, color=look.COLOURS["train"], linewidth=1.6, solid_capstyle="round")
        if segment.over and segment.ending.kind != "done":
            steps.plot(x[-1:], y[-1:], "o", color=KINDS[segment.ending.kind], markersize=3.5, zorder=3)
    steps.set_ylabel("step")
    steps.set_ylim(bottom=0)
    steps.margins(y=0.1)
    steps.grid(True, axis="y")
    _dates(steps)


def _rows(axes: Axes, shown: Sequence[Segment], story: Story) -> None:
    longest = max([segment.allocated for segment in shown], default=1.0) or 1.0
    waits = [segment.began - segment.asked for segment in shown if segment.asked is not None]
    widest = min(max(waits, default=0.0), longest)  # a longer wait is cut, and its length written
    second, name = look.unit(longest)
    height = 0.74
    for index, segment in enumerate(shown):
        phases = [
            (phase, max(-widest, begin - segment.began) / second, (end - segment.began) / second)
            for phase, begin, end in segment.phases()
            if end - segment.began > -widest
        ]
        _bars(axes, phases, index, height)
        for one in segment.checkpoints:
            if one.beside and segment.allocated:
                x = (one.captured - segment.began) / second
                axes.plot(
                    [x, x], [index + 0.19, index + height / 2], color=look.COLOURS["save"], linewidth=0.9
                )
        waited = 0.0 if segment.asked is None else segment.began - segment.asked
        if waited > widest * 1.01:
            text = f"← {look.duration(waited)}"
            axes.text(-widest / second, index, text, va="center", ha="left", fontsize=7)
        lost = f"   {look.count(segment.lost_steps, 'step')} lost" if segment.lost_steps else ""
        axes.text(
            longest * 1.012 / second,
            index,
            look.clean(segment.ending.label, 22) + lost,
            va="center",
            ha="left",
            fontsize=8 if len(shown) <= 45 else 6.5,
            color=KINDS[segment.ending.kind],
            fontweight="bold",
        )
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(-widest * 1.01 / second, longest * 1.005 / second)
    every = 1 if len(shown) <= 45 else 2 if len(shown) <= 90 else 5
    names = [segment.name if index % every == 0 else "" for index, segment in enumerate(shown)]
    axes.set_yticks(range(len(shown)), names, fontsize=8 if every == 1 else 7)
    axes.tick_params(axis="y", length=0)
    axes.set_ylabel("segment")
    axes.axvline(0, color=FAINT, linewidth=0.7)
    axes.spines["left"].set_visible(False)
    axes.grid(True, axis="x")
    label = (
        f"{name} since the job had its nodes" if any(s.nodes for s in shown) else f"{name} since the start"
    )
    if len(story.segments) > len(shown):
        label += f" (the newest {len(shown)} of {len(story.segments)} segments)"
    axes.set_xlabel(label)


def metrics(canvas: Canvas, found: Metrics, story: Story) -> None:
    """Draw the metrics over the steps of all segments, with the cuts marked."""
    curves = found.curves[:MOST_CURVES]
    columns = 1 if len(curves) == 1 else 2
    rows = -(-len(curves) // columns)
    total = metrics_height(found)
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
                step, color=KINDS[before.ending.kind], linewidth=0.8, linestyle=(0, (3, 2)), zorder=0
            )
        axes.set_title(look.clean(curve.name, 50), fontsize=9, loc="left", fontweight="bold")
        axes.set_xlim(0, max(story.steps, 1) * 1.01)
        if index + columns >= len(curves):
            axes.set_xlabel("step")


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
        for segment in story.segments:
            phases = [(phase, _day(begin), _day(end)) for phase, begin, end in segment.phases()]
            _bars(strip, phases, index, 0.72)
        strip.text(1.01, index, story.state, va="center", fontsize=8, transform=strip.get_yaxis_transform())
    first = min((story.began for story in shown), default=0.0)
    last = max([story.ended for story in shown] + [first + 1])
    strip.set_xlim(_day(first - 0.01 * (last - first)), _day(last + 0.01 * (last - first)))
    strip.set_ylim(len(shown) - 0.4, -0.6)
    strip.set_yticks(range(len(shown)), [look.clean(story.name, 26) for story in shown], fontsize=8)
    for index, label in enumerate(strip.get_yticklabels()):
        label.set_color(look.CURVES[index % len(look.CURVES)] if len(shown) <= len(look.CURVES) else INK)
    strip.tick_params(axis="y", length=0)
    _dates(strip)
    strip.grid(True, axis="x")
    for story in shown[:1]:
        merged = Story(**{**vars(story), "segments": [s for each in shown for s in each.segments]})
        _legend(canvas, merged, total)
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


class Drawing:
    """A figure of the right size, and what is made of it."""

    def __init__(self, height: float) -> None:
        self._matplotlib = library()
        with self._matplotlib.rc_context(_STYLE):
            self.figure = self._matplotlib.figure.Figure(figsize=(WIDTH, height))

    def draw(self, draw: Any, *arguments: Any) -> Drawing:
        with self._matplotlib.rc_context(_STYLE):
            draw(self.figure, *arguments)
        return self

    def stack(self, parts: Sequence[tuple[float, Any, Sequence[Any]]]) -> Drawing:
        """Draw several things one below the other: (height, function, its arguments) of each."""
        with self._matplotlib.rc_context(_STYLE):
            canvases = self.figure.subfigures(len(parts), 1, height_ratios=[height for height, _, _ in parts])
            for canvas, (_, draw, arguments) in zip(
                [canvases] if len(parts) == 1 else canvases, parts, strict=True
            ):
                draw(canvas, *arguments)
        return self

    def svg(self, name: str) -> str:
        """Return the figure for inside of an HTML page.

        Args:
            name: makes its inner ids differ from those of another figure in the page.
        """
        text = io.StringIO()
        with self._matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a character that the font lacks: the browser has others
            self.figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'<g id="\w+">', "<g>", svg)  # nothing refers to them
        svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
        for colour, variable in ((INK, "ink"), (FAINT, "faint"), (PAPER, "paper")):
            svg = svg.replace(colour, f"var(--{variable})")
        return svg

    def png(self, path: Path) -> None:
        """Write the figure as a PNG.

        Raises:
            OSError: it cannot be written.
        """
        with self._matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.figure.savefig(path, format="png", dpi=130, facecolor="white")


def nothing(canvas: Canvas, story: Story) -> None:
    """Draw that there is nothing to draw yet."""
    words = f"{look.clean(story.name, 60)}: no segment has begun yet"
    canvas.text(0.5, 0.5, words, ha="center", va="center", color=FAINT)
