"""What a run's page says of exactness, warnings and failures."""

from __future__ import annotations

from typing import Any

from chainrun import journal
from chainrun.report.html import Content, table, tag
from chainrun.report.look import NOTHING, count, moment
from chainrun.report.story import Story

LISTED = 100  # of one kind, the newest


def _several(event: dict[str, Any], key: str) -> list[Any]:
    found = event.get(key)
    return found if isinstance(found, list) else []


def exactness(story: Story) -> Content:
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
            for event in heard[-LISTED:]
        ]
        parts.append(table(["segment", "step", "verdict", ""], rows, "rrll"))
    for event in drifts[-LISTED:]:
        if event["event"] == "reshard":
            what = [f"ranks: {event.get('ranks_then')} -> {event.get('ranks_now')}"]
        else:
            what = [str(change) for change in _several(event, "changes")]
        words = f"Before segment {event.get('segment', '?')} the environment changed, so that bits may differ from there on:"
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


def warnings(story: Story) -> Content:
    """What happened that should not happen often."""

    def words(event: dict[str, Any]) -> str | None:
        kind = event["event"]
        if kind == "fallback":
            return f"the checkpoint {event.get('path')} was not trusted: {event.get('reason')}"
        if kind == "unsaved":
            return f"a save at step {event.get('step')} failed: {event.get('reason')}"
        if kind == "space":
            removed = ", ".join(map(str, _several(event, "removed")))
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
            changes = "; ".join(map(str, _several(event, "changes")))
            return "a person let the chain go on" + f", with {changes}" * bool(changes)
        if kind in ("warning", "boundless"):
            return str(event.get("reason"))
        if kind == "notified" and event.get("problem"):
            return f"the notification of {event.get('of')} failed: {event['problem']}"
        if kind == "cancel":
            return "a person cancelled the run"
        return None

    found = [(event, said) for event in story.events if (said := words(event))]
    rows = [[tag("span", moment(event["time"]), class_="whole"), said] for event, said in found[-LISTED:]]
    return table(["when", "what"], rows) if rows else None


def failures(story: Story) -> Content:
    failed = [event for event in story.events if event["event"] == "failed"]
    parts: list[Content] = []
    for event in failed[-20:]:
        words = (
            f"Rank {event.get('rank')} in segment {event.get('segment')} at step {event.get('step')}"
            + f" on {event.get('node')}" * bool(event.get("node"))
            + f": {event.get('error')}"
        )
        parts.append(tag("p", words, class_="bad"))
        if event.get("traceback"):
            parts.append(tag("details", [tag("summary", "Traceback"), tag("pre", str(event["traceback"]))]))
    return parts or None
