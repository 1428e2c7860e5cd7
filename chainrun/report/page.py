"""The page of one run: what it cost, what happened, what it learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from chainrun import journal
from chainrun.report import look
from chainrun.report.curves import Curve, Metrics
from chainrun.report.endings import KINDS, Ending
from chainrun.report.figure import MOST_CURVES
from chainrun.report.html import Content, Html, page, table, tag, text
from chainrun.report.look import NOTHING, count, duration, moment, part, size
from chainrun.report.story import PHASES, WAITS, Checkpoint, Segment, Story

STATES = {
    "done": "#2f9e5b",
    "running": "#3b82c4",
    "queued": "#8a6d3b",
    "failed": "#d64545",
    "stopped": "#c77b1a",
    "cancelled": "#7d8590",
}
ROWS = 400  # of one table, the newest
LISTED = 100  # warnings of one kind


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
            _cards(story),
            _time(story),
            section("Timeline", tag("div", Html(timeline), class_="figure") if timeline else None),
            section("Segments", _segments(story)),
            section("What each handoff cost", _handoffs(story)),
            section("Metrics", _metrics(story, metrics, curves)),
            section("Checkpoints", _checkpoints(story)),
            section("Exactness", _exactness(story)),
            section("Warnings", _warnings(story)),
            section("Failures", _failures(story)),
            section("Experiment", _experiment(story, experiment)),
            foot(story.now),
        ],
    )


def section(title: str, content: Content) -> Html:
    inner = text(content)
    return Html(tag("h2", title) + inner) if inner else Html("")


def foot(now: float) -> Html:
    return tag("footer", f"chainrun report, made {moment(now)}")


def badge(state: str) -> Html:
    return tag("span", state, class_="badge", style=f"background:{STATES.get(state, '#7d8590')}")


def ending(of: Ending) -> Html:
    return tag("span", of.label, class_="end", style=f"color:{KINDS[of.kind]}", title=of.more or None)


def card(number: str, words: str, more: str = "") -> Html:
    return tag(
        "div", [tag("b", number), tag("span", words), tag("span", more) if more else ""], class_="card"
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
    left = [s.unused for s in story.segments if s.unused is not None]
    kept = [one for one in story.checkpoints if one.exists]
    # of the steps of trained segments; what is not yet saved counts as trained
    cards = [
        card(part(story.goodput), "goodput", "training that counts, of the time with nodes"),
        card(duration(story.total("train")), "training", f"of {duration(story.allocated)} with nodes"),
    ]
    if story.node_hours:
        gpus = f"{look.hours(story.gpu_hours)} GPU hours" if story.gpu_hours else "no GPUs"
        cards.append(card(look.hours(story.node_hours), "node hours", gpus))
        cards.append(
            card(duration(story.total(*WAITS)), "waited for nodes", "queue, and holds after a requeue")
        )
    cards.append(card(duration(story.total("lost")), "lost training", f"{count(lost, 'step')} done twice"))
    cards.append(
        card(
            count(len(kept), "checkpoint"),
            f"{size(sum(one.bytes or 0 for one in kept))} on disk",
            f"{len(story.checkpoints)} saved, {duration(story.total('save'))} stood still",
        )
    )
    if left:
        cards.append(
            card(duration(sum(left) / len(left)), "walltime unused", f"mean of {count(len(left), 'stop')}")
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


def _newest(things: list[Any], what: str) -> tuple[list[Any], Html]:
    """Return the newest of many, and a line that says so."""
    if len(things) <= ROWS:
        return things, Html("")
    return things[-ROWS:], tag("p", f"The newest {ROWS} of {len(things)} {what}.", class_="faint")


def _segments(story: Story) -> Content:
    if not story.segments:
        return None
    slurm = any(segment.nodes for segment in story.segments)
    shown, line = _newest(story.segments, "segments")

    def row(segment: Segment) -> Iterator[Content]:
        yield segment.name
        yield ending(segment.ending)
        yield moment(segment.began)
        if slurm:
            yield segment.job + (f" (start {segment.restart + 1})" if segment.restart else "")
            yield ", ".join(segment.nodes) if len(segment.nodes) <= 4 else f"{len(segment.nodes)} nodes"
            yield duration(segment.seconds("hold") + segment.seconds("queue"))
        yield duration(segment.seconds("start") + segment.seconds("restore"))
        yield duration(segment.seconds("train"))
        yield f"{segment.from_step:,} → {segment.to_step:,}" if segment.number is not None else NOTHING
        lost = f"{count(segment.lost_steps, 'step')}, {duration(segment.seconds('lost'))}"
        nothing = segment.lost_steps == 0 and segment.seconds("lost") < 0.005
        yield NOTHING if nothing else tag("span", lost, class_="bad")
        yield duration(segment.unused)
        if slurm:
            yield look.hours(segment.node_hours)
        yield segment.ending.more

    heads = ["#", "ended by", "began"] + ["job", "nodes", "waited"] * slurm
    heads += (
        ["start + restore", "trained", "steps", "lost", "unused walltime"] + ["node hours"] * slurm + [""]
    )
    numbers = "lll" + "llr" * slurm + "rrrrr" + "r" * slurm
    return [table(heads, [list(row(segment)) for segment in shown], numbers), line]


def _handoffs(story: Story) -> Content:
    found, line = _newest(story.handoffs(), "handoffs")
    if not found:
        return None
    parts = [phase for phase in PHASES if any(handoff.parts.get(phase) for handoff in found)]
    parts = [phase for phase in parts if phase not in ("train", "lost")]
    heads = ["from → to", "after", "how", "in all", *(_SHORT[phase] for phase in parts)]
    heads += ["first step"]
    rows: list[list[Content]] = []
    for handoff in found:
        rows.append(
            [
                f"{handoff.before.name} → {handoff.after.name}",
                ending(handoff.before.ending),
                handoff.before.how or _how(handoff.before),
                tag("b", duration(handoff.seconds)),
                *(
                    duration(handoff.parts.get(phase, 0.0)) if handoff.parts.get(phase) else NOTHING
                    for phase in parts
                ),
                duration(handoff.parts.get("train", 0.0)),
            ]
        )
    mean = sum(handoff.seconds for handoff in found) / len(found)
    worst = max(found, key=lambda handoff: handoff.seconds)
    words = f"From the last step of a segment to the first step of the next one done: {duration(mean)} in the mean"
    if len(found) > 1:
        words += f", {duration(worst.seconds)} at most (segment {worst.before.name} → {worst.after.name})"
    return [tag("p", words + "."), table(heads, rows, "lll" + "r" * (len(heads) - 3)), line]


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


def _metrics(story: Story, metrics: Metrics, curves: str) -> Content:
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
        parts.append(tag("ul", [tag("li", note) for note in notes[:LISTED]]))
    return parts


def _not_finite(curve: Curve) -> str:
    return (
        f"{curve.name}: {count(curve.not_finite, 'value')} of {curve.count:,} "
        f"{'is' if curve.not_finite == 1 else 'are'} not finite, the first at step {curve.first_not_finite:,}"
    )


def _checkpoints(story: Story) -> Content:
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
    shown = [one for one in story.checkpoints if one.exists or not one.beside]
    shown += [one for one in story.checkpoints[-20:] if one not in shown]
    shown.sort(key=lambda one: one.time)
    hidden = len(story.checkpoints) - len(shown)
    shown, line = _newest(shown, "checkpoints listed")

    def row(one: Checkpoint) -> list[Content]:
        there = tag("b", "yes", class_="good") if one.exists else tag("span", "removed", class_="faint")
        stall = duration(one.stall) if one.beside else NOTHING
        return [
            one.name, f"{one.step:,}", by_number[id(one)], one.reason, size(one.bytes), duration(one.seconds),
            stall, moment(one.time), there,
        ]  # fmt: skip

    heads = ["checkpoint", "step", "segment", "reason", "size", "written in", "stall", "committed", "on disk"]
    more = (
        tag("p", f"{hidden} more that were removed since are not listed.", class_="faint") if hidden else ""
    )
    return [tag("p", words + "."), table(heads, map(row, shown), "lrrlrrrll"), more, line]


def _exactness(story: Story) -> Content:
    """What the witnesses say, and what has changed in the environment."""
    heard = [event for event in story.events if event["event"] == "witness"]
    drifts = [event for event in story.events if event["event"] in ("drift", "reshard")]
    parts: list[Content] = []
    if heard:
        same = [event for event in heard if event.get("identical")]
        parts.append(
            tag(
                "p",
                f"{len(same)} of {count(len(heard), 'handoff')} that left a witness went on identically: what the next "
                "segment saw first is what the one before would have seen.",
                class_="good" if len(same) == len(heard) else "bad",
            )
        )
        rows = [
            [
                str(event.get("segment", NOTHING)),
                str(event.get("step", NOTHING)),
                tag("b", "identical", class_="good")
                if event.get("identical")
                else tag("b", "differs", class_="bad"),
                _sentence(event),
            ]
            for event in heard[-ROWS:]
        ]
        parts.append(table(["segment", "step", "verdict", ""], rows, "rrll"))
    for event in drifts[-LISTED:]:
        if event["event"] == "reshard":
            what = [f"ranks: {event.get('ranks_then')} -> {event.get('ranks_now')}"]
        else:
            what = [str(change) for change in event.get("changes") or []]
        words = f"Before segment {event.get('segment', '–')} the environment changed, so that bits may differ from there on:"
        parts.append(tag("p", words, class_="warn"))
        parts.append(tag("ul", [tag("li", change.replace(" -> ", " → ")) for change in what]))
    if story.segments and len(story.segments) > 1 and not drifts:
        parts.append(tag("p", "The environment has not changed between segments.", class_="faint"))
    return parts or None


def _sentence(event: dict[str, Any]) -> str:
    try:
        return journal.witnessed(event)
    except (KeyError, TypeError, ValueError):
        return "the journal's line is damaged"


def _warnings(story: Story) -> Content:
    """What happened that should not happen often."""

    def words(event: dict[str, Any]) -> str | None:
        kind = event["event"]
        if kind == "fallback":
            return f"the checkpoint {event.get('path')} was not trusted: {event.get('reason')}"
        if kind == "unsaved":
            return f"a save at step {event.get('step')} failed: {event.get('reason')}"
        if kind == "space":
            removed = ", ".join(map(str, event.get("removed") or []))
            return f"{event.get('reason')}" + f"; removed {removed}" * bool(removed)
        if kind == "deferred":
            return f"a save or stop waited at step {event.get('step')}: {event.get('reason')}"
        if kind == "exclude":
            return f"{event.get('failures')} segments failed on node {event.get('node')}: the chain keeps away from it"
        if kind == "handoff" and event.get("refused"):
            how = event.get("how")
            return (
                f"handing over by {how} was refused: {event['refused']}"
                if how
                else f"the chain stopped: {event['refused']}"
            )
        if kind == "continue":
            changes = "; ".join(map(str, event.get("changes") or []))
            return "a person let the chain go on" + f", with {changes}" * bool(changes)
        if kind == "cancel":
            return "a person cancelled the run"
        return None

    found = [(event, said) for event in story.events if (said := words(event))]
    rows = [[moment(event["time"]), said] for event, said in found[-LISTED:]]
    return table(["when", "what"], rows) if rows else None


def _failures(story: Story) -> Content:
    failed = [event for event in story.events if event["event"] == "failed"]
    parts: list[Content] = []
    for event in failed[-20:]:
        words = (
            f"Rank {event.get('rank')} in segment {event.get('segment')} at step {event.get('step')}"
            + f" on {event['node']}" * bool(event.get("node"))
            + f": {event.get('error')}"
        )
        parts.append(tag("p", words, class_="bad"))
        if event.get("traceback"):
            parts.append(tag("details", [tag("summary", "Traceback"), tag("pre", str(event["traceback"]))]))
    return parts or None


def _experiment(story: Story, experiment: str) -> Content:
    parts: list[Content] = []
    if experiment:
        parts.append(tag("details", [tag("summary", story.run.experiment.name), tag("pre", experiment)]))
    if story.run.done.exists() and story.run.result.exists():
        result = story.run.result.read_text(errors="replace")[:20_000]
        parts.append(tag("details", [tag("summary", "Result"), tag("pre", result)]))
    return parts or None
