"""The page of one run: what it cost, what happened, what it learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from chainrun.report import look, tables, troubles
from chainrun.report.curves import Metrics
from chainrun.report.html import Content, Html, badge, card, foot, page, section, tag
from chainrun.report.look import count, duration, moment, part, size
from chainrun.report.story import PHASES, WAITS, Story


def run_page(story: Story, metrics: Metrics, timeline: str, curves: str, experiment: str) -> str:
    """Return the page of a run.

    Args:
        timeline, curves: the figures as SVG; empty where there is nothing to draw.
        experiment: the experiment's file.
    """
    return page(
        f"{story.name} · chainrun report",
        [
            _head(story),
            _cards(story) if story.segments else None,
            _time(story),
            section("Timeline", tag("div", Html(timeline), class_="figure") if timeline else None),
            section("Segments", tables.segments(story)),
            section("What each handoff cost", tables.handoffs(story)),
            section("Metrics", tables.metrics(story, metrics, curves)),
            section("Checkpoints", tables.checkpoints(story)),
            section("Exactness", troubles.exactness(story)),
            section("Warnings", troubles.warnings(story)),
            section("Failures", troubles.failures(story)),
            section("Experiment", _experiment(story, experiment)),
            foot(story.now),
        ],
    )


def _head(story: Story) -> Iterator[Html]:
    yield tag("h1", [story.name, badge(story.state)])
    yield tag("div", f"{story.run.path} · id {story.id}", class_="path")
    yield tag("p", summary(story))
    if story.remark:
        bad = "bad" if story.state == "failed" else "warn" if story.state == "stopped" else "faint"
        yield tag("p", story.remark, class_=bad)


def summary(story: Story) -> str:
    """Return what happened, in a sentence."""
    trained = [s for s in story.segments if s.number is not None]
    if not trained:
        return "No segment has begun yet."
    ends = Counter(s.ending.label for s in trained)
    listed = ", ".join(f"{label} ({number})" if number > 1 else label for label, number in ends.most_common())
    progress = f" ({part(story.fraction)} of the training)" if story.fraction not in (None, 1.0) else ""
    return (
        f"{count(story.steps, 'step')}{progress} in {count(len(trained), 'segment')} over "
        f"{duration(story.ended - story.began)}, {moment(story.began)} to {moment(story.ended)}. "
        f"How the segments ended: {listed}."
    )


def _cards(story: Story) -> Html:
    lost = sum(segment.lost_steps for segment in story.segments)
    left = [s.unused for s in story.segments if s.unused is not None and s.ending.kind == "walltime"]
    kept = [one for one in story.checkpoints if one.exists]
    where = "with nodes" if story.node_hours else "in segments"
    cards = [
        card(part(story.goodput), "goodput", f"training that counts, of the time {where}"),
        card(duration(story.total("train")), "training", f"of {duration(story.allocated)} {where}"),
    ]
    if story.node_hours:
        gpus = f"{look.hours(story.gpu_hours)} GPU hours" if story.gpu_hours else "no GPUs"
        cards.append(card(look.hours(story.node_hours), "node hours", gpus))
        cards.append(
            card(duration(story.total(*WAITS)), "waited for nodes", "queue, and holds after a requeue")
        )
    cards.append(
        card(
            duration(story.total("lost")),
            "lost training",
            f"{count(lost, 'step')}, never saved",
        )
    )
    cards.append(
        card(
            f"{len(kept)}",
            f"checkpoint{'s' * (len(kept) != 1)} on disk, {size(sum(one.bytes or 0 for one in kept))}",
            f"{len(story.checkpoints)} saved, {duration(story.total('save'))} stood still",
        )
    )
    if left:
        cards.append(
            card(
                duration(sum(left) / len(left)),
                "walltime unused",
                f"mean of {count(len(left), 'walltime stop')}",
            )
        )
    return tag("div", cards, class_="cards")


def _time(story: Story) -> Content:
    """Where the time with nodes went, as one bar."""
    totals = {phase: story.total(phase) for phase in PHASES if phase not in WAITS}
    whole = sum(totals.values())
    if whole <= 0:
        return None
    bar = [
        tag("div", style=f"width:{100 * seconds / whole:.3f}%;background:{look.COLOURS[phase]}", title=phase)
        for phase, seconds in totals.items()
        if seconds > 0
    ]
    key = [
        tag(
            "span",
            [
                tag("i", style=f"background:{look.COLOURS[phase]}"),
                f"{PHASES[phase]} {duration(seconds)} ({part(seconds / whole)})",
            ],
        )
        for phase, seconds in totals.items()
        if seconds > 0
    ]
    return [tag("div", bar, class_="bar"), tag("div", key, class_="key")]


def _experiment(story: Story, experiment: str) -> Content:
    parts: list[Content] = []
    if experiment:
        parts.append(tag("details", [tag("summary", story.run.experiment.name), tag("pre", experiment)]))
    if story.run.done.exists() and story.run.result.exists():
        result = story.run.result.read_text(errors="replace")[:20_000]
        parts.append(tag("details", [tag("summary", "Result"), tag("pre", result)]))
    return parts or None
