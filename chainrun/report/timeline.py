"""The timeline of a run: against the calendar, and each segment by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from chainrun.report import look
from chainrun.report.endings import KINDS
from chainrun.report.figure import FAINT, PAPER, Axes, Canvas, dates, day
from chainrun.report.story import PHASES, WAITS, Segment, Story

MOST_ROWS = 120  # segments, the newest
Phases = Sequence[tuple[str, float, float]]


def height(story: Story) -> float:
    """Return the inches that the timeline needs."""
    return sum(tall + gap for tall, gap in _layout(story)) + _LEGEND


_LEGEND = 0.6  # inches


def _layout(story: Story) -> list[tuple[float, float]]:
    """Return the height of each part, and of the gap below it, in inches."""
    rows = min(len(story.segments), MOST_ROWS)
    return [(0.35, 0.05), (1.0, 0.75), (max(0.3, rows * _row(rows)), 0.5)]


def _row(rows: int) -> float:
    return 0.27 if rows <= 45 else 0.16


def draw(canvas: Canvas, story: Story) -> None:
    """Draw all segments: against the calendar, with the steps that they reached, and each by itself."""
    total = height(story)
    top = total - _LEGEND
    made = []
    for tall, gap in _layout(story):
        made.append(canvas.add_axes((0.085, (top - tall) / total, 0.705, tall / total)))
        top -= tall + gap
    strip, steps, rows = made
    _calendar(strip, steps, story)
    _rows(rows, story.segments[-MOST_ROWS:], story)
    legend(canvas, story, total)


def legend(canvas: Canvas, story: Story, total: float) -> None:
    from matplotlib.patches import Patch

    present = {phase for segment in story.segments for phase, _, _ in segment.phases()}
    handles = [Patch(label=text, **_paint(phase)) for phase, text in PHASES.items() if phase in present]
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


def _paint(phase: str) -> dict[str, Any]:
    paint: dict[str, Any] = {"facecolor": look.COLOURS[phase], "linewidth": 0}
    if phase == "lost":
        paint |= {"hatch": "////", "edgecolor": PAPER}
    elif phase in WAITS:  # on light paper and on dark
        paint |= {"alpha": 0.55 if phase == "queue" else 0.28}
    return paint


def bars(axes: Axes, rows: Iterable[tuple[float, Phases]], height: float) -> None:
    """Draw the phases of several rows: (y of the row's middle, its phases) of each."""
    from matplotlib.collections import PolyCollection

    found: dict[str, list[list[tuple[float, float]]]] = {}
    for y, phases in rows:
        low, high = y - height / 2, y + height / 2
        for phase, begin, end in _seamless(phases):
            corners = [(begin, low), (begin, high), (end, high), (end, low)]
            found.setdefault(phase, []).append(corners)
    for phase in sorted(found, key=lambda phase: phase == "save"):  # these on top of the training
        axes.add_collection(PolyCollection(found[phase], **_paint(phase)), autolim=False)


def on_calendar(segment: Segment) -> Phases:
    """Return the phases of a segment, their times as those of an axis that shows the calendar."""
    return [(phase, day(begin), day(end)) for phase, begin, end in segment.phases()]


def _seamless(phases: Phases) -> Phases:
    """Make one bar of training that goes on after a save, over which the save is drawn."""
    whole: list[tuple[str, float, float]] = []
    for phase, begin, end in phases:
        if phase == "train" and len(whole) > 1 and whole[-1][0] == "save" and whole[-2][0] == "train":
            save = whole.pop()
            whole[-1:] = [save, ("train", whole[-1][1], end)]
        else:
            whole.append((phase, begin, end))
    return whole


def _calendar(strip: Axes, steps: Axes, story: Story) -> None:
    bars(strip, [(0.5, on_calendar(segment)) for segment in story.segments], 1.0)
    first, last = story.began, max(story.ended, story.began + 1)
    room = 0.01 * (last - first)
    for axes in (strip, steps):
        axes.set_xlim(day(first - room), day(last + room))
    strip.set_ylim(0, 1)
    strip.set_yticks([0.5], ["run"])
    strip.tick_params(length=0, labelbottom=False)
    for side in ("left", "bottom"):
        strip.spines[side].set_visible(False)
    for segment in story.segments:
        if segment.trains is None:
            continue
        known = [(segment.trains, segment.from_step)]
        known += [(one.captured, one.step) for one in segment.checkpoints]
        known.append((segment.last_boundary, segment.to_step))
        known.sort()
        x, y = [day(at) for at, _ in known], [step for _, step in known]
        steps.plot(x, y, color=look.COLOURS["train"], linewidth=1.6, solid_capstyle="round")
        if segment.over and segment.ending.kind != "done":
            steps.plot(x[-1:], y[-1:], "o", color=KINDS[segment.ending.kind], markersize=3.5, zorder=3)
    steps.set_ylabel("step")
    most = max([segment.to_step for segment in story.segments], default=0)
    steps.set_ylim(0, 1.12 * max(most, 1))
    steps.yaxis.get_major_locator().set_params(integer=True, nbins=3)
    steps.grid(True, axis="y")
    steps.yaxis.set_major_formatter("{x:,.0f}")
    dates(steps)


def _rows(axes: Axes, shown: Sequence[Segment], story: Story) -> None:
    longest = max([segment.allocated for segment in shown], default=1.0) or 1.0
    waits = [segment.began - segment.asked for segment in shown if segment.asked is not None]
    widest = min(max(waits, default=0.0), longest)  # a longer wait is cut, and its length written
    second, name = look.unit(longest)

    def of(segment: Segment) -> Phases:
        return [
            (phase, max(-widest, begin - segment.began) / second, (end - segment.began) / second)
            for phase, begin, end in segment.phases()
            if end - segment.began > -widest
        ]

    bars(axes, ((index, of(segment)) for index, segment in enumerate(shown)), 0.74)
    saves = [
        ((one.captured - segment.began) / second, index)
        for index, segment in enumerate(shown)
        for one in segment.checkpoints
        if one.beside
    ]
    x, y = [x for x, _ in saves], [index for _, index in saves]
    axes.vlines(
        x, [each + 0.19 for each in y], [each + 0.37 for each in y], look.COLOURS["save"], linewidth=0.9
    )
    for index, segment in enumerate(shown):
        waited = 0.0 if segment.asked is None else segment.began - segment.asked
        if waited > widest * 1.01:
            text = f"← {look.duration(waited)}"
            axes.text(-widest / second, index, text, va="center", ha="left", fontsize=7)
        lost = f" · {look.count(segment.lost_steps, 'step')} lost" if segment.lost_steps else ""
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


def title(canvas: Canvas, story: Story) -> None:
    """Write what the picture shows, which the page says elsewhere."""
    canvas.text(0.02, 0.62, look.clean(story.name, 70), fontsize=14, fontweight="bold", va="center")
    words = [story.state, look.count(story.steps, "step"), look.count(len(story.segments), "segment")]
    if story.segments:
        words += [f"goodput {look.part(story.goodput)}"]
    if story.node_hours:
        words += [f"{look.hours(story.node_hours)} node hours"]
    if story.gpu_hours:
        words += [f"{look.hours(story.gpu_hours)} GPU hours"]
    canvas.text(0.02, 0.18, "  ·  ".join(words), va="center")
