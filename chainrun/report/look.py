"""Words, numbers and colours, the same in the page and in the figures."""

from __future__ import annotations

import math
import re
import time

COLOURS = {
    "hold": "#7f8b99",
    "queue": "#7f8b99",
    "start": "#f3d27a",
    "restore": "#eda13a",
    "train": "#3f8fc9",
    "save": "#7a57b8",
    "lost": "#d64545",
    "handoff": "#5d6b7a",
}
"""Of the phases of a segment."""
NOTHING = "\N{EN DASH}"  # in place of what is not known, or is not there
CURVES = ("#3f8fc9", "#d9822b", "#2f9e5b", "#c0399f", "#7a57b8", "#1c9ba8", "#8a6d3b", "#d64545")


def duration(seconds: float | None) -> str:
    """Return a duration in its two largest units: ``3d 4h``, ``12min 5s``, ``0.42s``."""
    if seconds is None:
        return NOTHING
    if seconds < 0:
        return "-" + duration(-seconds)
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f}ms" if seconds >= 0.0005 else "0s"
    if seconds < 60:
        return (
            f"{seconds:.2f}s" if seconds < 1 else f"{seconds:.1f}s" if seconds < 9.95 else f"{seconds:.0f}s"
        )
    rest = round(seconds)
    days, rest = divmod(rest, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next(index for index, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count}{unit}" for count, unit in parts[first : first + 2] if count)


def size(count: float | None) -> str:
    """Return a number of bytes for people."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g}\N{NO-BREAK SPACE}{unit}"
        count /= 1000
    return f"{count:.3g}\N{NO-BREAK SPACE}TB"


def hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 99.95 else f"{value:.3g}"


def part(value: float | None) -> str:
    """Return a fraction in percent; one that is not all never looks like all."""
    if value is None:
        return NOTHING
    shown = f"{value:.1%}" if value < 0.0995 or 0.9 < value < 1 else f"{value:.0%}"
    return "99.9%" if shown.startswith("100") and value < 1 else shown


def value(number: float | None) -> str:
    if number is None:
        return NOTHING
    return f"{number:,.0f}" if number == int(number) and abs(number) < 1e7 else f"{number:.4g}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def moment(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def clean(text: str, most: int = 0) -> str:
    """Return one line of text without what no XML may hold; shortened to `most` characters, if given."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]+", " ", text).strip()
    return text[: most - 1] + "…" if most and len(text) > most else text


def unit(longest: float) -> tuple[float, str]:
    """Return the unit, in seconds, and its name for an axis that ends at `longest` seconds."""
    for seconds, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if longest >= 2 * seconds and math.isfinite(longest):
            return seconds, name
    return 1.0, "seconds"
