"""The tables of a run's page: segments, handoffs, metrics, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chainrun.report import look
from chainrun.report.curves import Curve, Metrics
from chainrun.report.endings import KINDS
from chainrun.report.html import Content, Html, ending, table, tag
from chainrun.report.look import NOTHING, count, duration, moment, size
from chainrun.report.plots import MOST_CURVES
from chainrun.report.story import PHASES, Checkpoint, Handoff, Segment, Story

FOLDED = 12  # rows of a table that is secondary, at most
ROWS = 400  # of one table, the newest


def _newest(things: list[Any], what: str) -> tuple[list[Any], Html]:
    """Return the newest of many, and a line that says so."""
    if len(things) <= ROWS:
        return things, Html("")
    return things[-ROWS:], tag("p", f"The newest {ROWS} of {len(things)} {what}.", class_="faint")


def segments(story: Story) -> Content:
    if not story.segments:
        return None
    slurm = any(segment.nodes for segment in story.segments)
    shown, line = _newest(story.segments, "segments")

    def row(segment: Segment) -> Iterator[Content]:
        yield segment.name
        yield [ending(segment.ending), tag("div", segment.ending.more, class_="small")]
        yield tag("span", moment(segment.began), class_="whole")
        if slurm:
            again = f", start {segment.restart + 1}" if segment.restart else ""
            nodes = ", ".join(segment.nodes) if len(segment.nodes) <= 3 else f"{len(segment.nodes)} nodes"
            yield [tag("span", segment.job + again, class_="whole"), tag("div", nodes, class_="small")]
            yield duration(segment.seconds("hold") + segment.seconds("queue"))
        yield duration(segment.seconds("start") + segment.seconds("restore"))
        yield duration(segment.seconds("train"))
        yield f"{segment.from_step:,} → {segment.to_step:,}" if segment.number is not None else NOTHING
        lost = [
            count(segment.lost_steps, "step"),
            tag("div", duration(segment.seconds("lost")), class_="small"),
        ]
        nothing = segment.lost_steps == 0 and segment.seconds("lost") < 0.5
        yield NOTHING if nothing else tag("span", lost, class_="bad")
        yield duration(segment.unused)
        if slurm:
            yield look.hours(segment.node_hours)

    heads = ["#", "ended by", "began"] + ["job, nodes", "waited"] * slurm
    heads += ["start, restore", "trained", "steps", "lost", "unused"] + ["node hours"] * slurm
    numbers = "lll" + "lr" * slurm + "rrrrr" + "r" * slurm
    words = (
        "Unused: what was left of the walltime when the segment had stopped. "
        "Lost: what was trained and not saved, as of the last sign of life."
    )
    return [
        table(heads, [list(row(segment)) for segment in shown], numbers),
        line,
        tag("p", words, class_="small"),
    ]


def handoffs(story: Story) -> Content:
    found = story.handoffs()
    if not found:
        return None
    parts = [phase for phase in PHASES if any(handoff.parts.get(phase) for handoff in found)]
    parts = [phase for phase in parts if phase not in ("train", "lost")]
    loses = any(handoff.before.seconds("lost") for handoff in found)

    def row(handoff: Handoff) -> list[Content]:
        before, lost = handoff.before, handoff.before.seconds("lost")
        cells: list[Content] = [f"{before.name} → {handoff.after.name}", ending(before.ending)]
        cells += [before.how or _how(before), tag("b", duration(handoff.seconds))]
        cells += [duration(handoff.parts[phase]) if handoff.parts.get(phase) else NOTHING for phase in parts]
        cells += [duration(handoff.parts.get("train", 0.0))]
        return cells + [tag("span", duration(lost), class_="bad") if lost else NOTHING] * loses

    heads = ["from → to", "after", "how", "in all", *(_SHORT[phase] for phase in parts), "first step"]
    heads += ["and lost work"] * loses
    numbers = "lll" + "r" * (len(heads) - 3)
    mean = sum(handoff.seconds for handoff in found) / len(found)
    worst = sorted(found, key=lambda handoff: -handoff.seconds)
    words = f"From the last step of a segment to the first step of the next one done: {duration(mean)} in the mean"
    if len(found) > 1:
        most = worst[0]
        words += f", {duration(most.seconds)} at most (segment {most.before.name} → {most.after.name})"
    if len(found) <= FOLDED:
        return [tag("p", words + "."), table(heads, map(row, found), numbers)]
    shown, line = _newest(found, "handoffs")
    return [
        tag("p", words + ". The dearest ones:"),
        table(heads, map(row, worst[:6]), numbers),
        tag("details", [tag("summary", f"All {len(found)}"), table(heads, map(row, shown), numbers), line]),
    ]


_SHORT = {
    "hold": "SLURM's hold",
    "queue": "queue",
    "start": "start, imports",
    "restore": "restore",
    "save": "last save",
    "handoff": "handing over",
}


def _how(segment: Segment) -> str:
    if segment.ending.kind in ("node failure", "preemption", "killed", "requeued") and segment.nodes:
        return "SLURM, by itself"
    return "a person" if segment.ending.kind in ("cancelled", "crash", "unknown", "killed") else NOTHING


def metrics(story: Story, metrics: Metrics, curves: str) -> Content:
    if not metrics.curves and not metrics.others:
        return tag("p", "The function has logged no metrics.", class_="faint") if story.steps else None
    parts: list[Content] = []
    if story.cuts and curves:
        kinds = dict.fromkeys((before.ending.kind for _, before in story.cuts))
        key = [tag("span", [tag("i", style=f"background:{KINDS[kind]}"), kind]) for kind in kinds]
        parts.append(tag("div", ["Dashed lines are the cuts between segments:", *key], class_="key"))
    if curves:
        parts.append(tag("div", Html(curves), class_="figure"))
    notes = [_not_finite(curve) for curve in metrics.curves if curve.not_finite]
    if len(metrics.curves) > MOST_CURVES:
        names = ", ".join(
            f"{curve.name} = {look.value(curve.last)}"
            for curve in metrics.curves[MOST_CURVES : MOST_CURVES + 200]
        )
        notes.append(f"{len(metrics.curves) - MOST_CURVES} more, their last values: {names}")
    if metrics.others:
        listed = [f"{name} ({kind})" for name, kind in list(metrics.others.items())[:50]]
        notes.append(f"not numbers, so not drawn: {', '.join(listed)}")
    if notes:
        parts.append(tag("ul", [tag("li", note) for note in notes[:ROWS]]))
    return parts


def _not_finite(curve: Curve) -> str:
    return (
        f"{curve.name}: {count(curve.not_finite, 'value')} of {curve.count:,} "
        f"{'is' if curve.not_finite == 1 else 'are'} not finite, the first at step {curve.first_not_finite:,}"
    )


def checkpoints(story: Story) -> Content:
    if not story.checkpoints:
        return None
    by_number = {id(one): s.name for s in story.segments for one in s.checkpoints}
    beside = [one for one in story.checkpoints if one.beside]
    words = f"{count(len(story.checkpoints), 'checkpoint')} committed"
    if beside:
        mean = sum(one.stall for one in beside) / len(beside)
        words += (
            f"; {len(beside)} of them beside the training, which stood still for {duration(mean)} each in the mean "
            f"and {duration(max(one.stall for one in beside))} at most"
        )
    shown = [one for one in story.checkpoints if one.exists]
    every, line = _newest(story.checkpoints, "checkpoints")

    def row(one: Checkpoint) -> list[Content]:
        there = tag("b", "yes", class_="good") if one.exists else tag("span", "removed", class_="faint")
        stall = duration(one.stall) if one.beside else NOTHING
        return [
            one.name, f"{one.step:,}", by_number[id(one)], one.reason, size(one.bytes), duration(one.seconds),
            stall, tag("span", moment(one.time), class_="whole"), there,
        ]  # fmt: skip

    heads = ["checkpoint", "step", "segment", "reason", "size", "written in", "stall", "committed", "on disk"]
    listed = table(heads, map(row, shown[-ROWS:]), "lrrlrrrll") if shown else ""
    if len(every) <= FOLDED or len(every) == len(shown):
        return [tag("p", words + "."), table(heads, map(row, every), "lrrlrrrll"), line]
    unfolded = [
        tag("summary", f"All {len(story.checkpoints):,}"),
        table(heads, map(row, every), "lrrlrrrll"),
        line,
    ]
    return [
        tag("p", words + ". Those that are still on disk:"),
        listed,
        tag("details", unfolded),
    ]
