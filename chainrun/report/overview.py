"""The page of several runs: a row each, with small curves."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chainrun.report import look
from chainrun.report.curves import Curve, Metrics
from chainrun.report.html import Content, Html, badge, card, foot, page, section, table, tag
from chainrun.report.story import Story


def names_of(found: Sequence[Metrics]) -> list[str]:
    """Return the metrics that are shown of every run: those that most runs have, in the order of their first line."""
    have: Counter[str] = Counter()
    for metrics in found:
        have.update(curve.name for curve in metrics.curves)
    most = max(have.values(), default=0)
    return [name for name, number in have.items() if number == most][:4]


def overview_page(
    folder: Path,
    stories: Sequence[Story],
    found: Sequence[Metrics],
    arguments: Sequence[dict[str, Any]],
    drawing: str,
    out: Path,
    now: float,
) -> str:
    """Return the page of several runs.

    Args:
        arguments: of each run, the experiment's keys that differ between the runs.
        drawing: the figure as SVG; empty where there is nothing to draw.
        out: the page's file: where a run has a report of its own, its row links to that.
    """
    states = Counter(story.state for story in stories)
    listed = ", ".join(f"{number} {state}" for state, number in states.most_common())
    allocated = sum(story.allocated for story in stories)
    trained = sum(story.total("train") for story in stories)
    nodes, gpus = (sum(hours) for hours in zip(*((s.node_hours, s.gpu_hours) for s in stories), strict=True))
    cards = [
        card(look.count(len(stories), "run"), listed),
        card(look.part(trained / allocated if allocated else None), "goodput", "of the time with nodes"),
        card(look.duration(trained), "training", f"of {look.duration(allocated)} with nodes"),
        card(look.duration(sum(story.total("lost") for story in stories)), "lost training"),
    ]
    if nodes:
        cards.insert(
            3, card(look.hours(nodes), "node hours", f"{look.hours(gpus)} GPU hours" if gpus else "no GPUs")
        )
    differing = list(dict.fromkeys(key for each in arguments for key in each))
    names = [name for name in names_of(found) if f"args.{name}" not in differing]
    shares = any(story.fraction is not None for story in stories)
    heads = ["run", "state", *(key.removeprefix("args.") for key in differing), "steps", *["done"] * shares]
    heads += ["segments", "goodput", *["node hours"] * bool(nodes), *names[:3]]
    numbers = "ll" + "l" * len(differing) + "rrr" + "r" * shares + "r" * bool(nodes)

    def row(index: int) -> list[Content]:
        story, metrics = stories[index], {curve.name: curve for curve in found[index].curves}
        last = next((s for s in reversed(story.segments) if s.number is not None), None)
        more = story.remark
        if not more and last is not None and story.state not in ("done", "running"):
            more = last.ending.label
        cells: list[Content] = [[_link(story, out), tag("div", look.clean(more, 200), class_="small")]]
        cells += [badge(story.state), *(_short(arguments[index].get(key)) for key in differing)]
        cells += [f"{story.steps:,}", *[look.part(story.fraction)] * shares, f"{len(story.segments):,}"]
        cells += [look.part(story.goodput), *[look.hours(story.node_hours)] * bool(nodes)]
        return cells + [
            _spark(metrics.get(name), look.CURVES[index % len(look.CURVES)]) for name in names[:3]
        ]

    return page(
        f"{folder.name} · chainrun report",
        [
            tag("h1", folder.name),
            tag("div", str(folder), class_="path"),
            tag("div", cards, class_="cards"),
            section("Runs", table(heads, map(row, range(len(stories))), numbers)),
            section("Timeline and metrics", tag("div", Html(drawing), class_="figure") if drawing else None),
            foot(now),
        ],
    )


def _link(story: Story, out: Path) -> Html:
    name = tag("b", story.name)
    if not story.run.report.exists():
        return name
    from urllib.parse import quote

    return tag("a", name, href=quote(os.path.relpath(story.run.report, out.parent)))


def _short(value: Any) -> str:
    return look.NOTHING if value is None else look.clean(str(value), 40)


def _spark(curve: Curve | None, colour: str) -> Html:
    """Return a small curve and its last value."""
    if curve is None or curve.last is None:
        return Html(look.NOTHING)
    steps, means, _, _ = curve.points()
    every = max(1, len(steps) // 120)
    x, y = steps[::every], means[::every]
    if x[-1] != steps[-1]:
        x, y = [*x, steps[-1]], [*y, means[-1]]
    wide, tall = 76.0, 22.0
    low, high, begin, end = min(y), max(y), x[0], x[-1]
    points = " ".join(
        f"{2 + (wide - 4) * (a - begin) / ((end - begin) or 1):.1f},{tall - 3 - (tall - 6) * (b - low) / ((high - low) or 1):.1f}"
        for a, b in zip(x, y, strict=True)
    )
    drawn = (
        f'<svg width="{wide:.0f}" height="{tall:.0f}" viewBox="0 0 {wide:.0f} {tall:.0f}" style="vertical-align:-6px">'
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.4"/></svg> '
    )
    return tag("span", [Html(drawn), look.value(curve.last)], class_="whole")
