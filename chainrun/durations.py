"""Durations as people and SLURM write them: `4h`, `1h30min`, `20s`, `12:00:00`, `1-12:00:00`."""

from __future__ import annotations

import re
from typing import Any

from chainrun.errors import ExperimentError

ALLOWED = "a duration such as 2d, 4h, 1h30min, 20s, 12:00:00 or 1-12:00:00"

# Milliseconds, so that sums are exact and what `format_duration` writes reads back as the same float.
_UNITS = {"d": 86_400_000, "h": 3_600_000, "min": 60_000, "s": 1_000}
_PARTS = re.compile(r"\s*".join(rf"(?:([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)\s*{unit})?" for unit in _UNITS))
_CLOCK = re.compile(r"()([0-9]{1,9}):([0-5][0-9]):([0-5][0-9])")
_DAYS_CLOCK = re.compile(r"([0-9]{1,9})-([01]?[0-9]|2[0-3])(?::([0-5][0-9]))?(?::([0-5][0-9]))?")
_LONE_M = re.compile(r"(?<=[0-9])(\s*)[mM](?![a-z])")


def parse_duration(text: Any, key: str) -> float:
    """Return the seconds that `text` stands for, to the millisecond; `key` names the value in an error."""
    try:
        return read_duration(text)
    except ValueError as error:
        reason = f", {error}" if str(error) else ""
        raise ExperimentError(f"{key}: found {text!r}{reason}; allowed: {ALLOWED}") from None


def read_duration(value: Any) -> float:
    """Return the seconds that `value` stands for, or raise a ValueError whose text is the reason, if any."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    text = str(value).strip()
    if text.startswith("-"):
        raise ValueError("which is negative")
    milliseconds = _milliseconds(text)
    if milliseconds is None:
        raise ValueError(_why_not(text))
    if milliseconds == 0:
        raise ValueError("which is zero")
    return milliseconds / 1000


def format_duration(seconds: float) -> str:
    """Write seconds as `1d 12h`, `1h 30min` or `0.25s`, to the millisecond; `parse_duration` reads it back."""
    rest = round(abs(seconds) * 1000)
    sign = "-" if seconds < 0 and rest else ""
    parts = []
    for unit, size in _UNITS.items():
        count, rest = (rest / size, 0) if unit == "s" else divmod(rest, size)
        if count:
            parts.append(f"{count:.3f}".rstrip("0").rstrip(".") + unit)
    return sign + (" ".join(parts) or "0s")


def rough_duration(seconds: float) -> str:
    """Write seconds for a glance, in its two largest units: `2d 3h`, `1h 30min`, `45s`."""
    rest = max(0, round(seconds))
    if rest >= 86_400:
        rest = round(rest / 3600) * 3600
    elif rest >= 600:
        rest = round(rest / 60) * 60
    return format_duration(rest)


def _milliseconds(text: str) -> int | None:
    """Read every form that is allowed; None for any other text."""
    match = _DAYS_CLOCK.fullmatch(text) or _CLOCK.fullmatch(text) or (text and _PARTS.fullmatch(text))
    if not match:
        return None
    numbers = [group or "0" for group in match.groups()]
    return sum(round(float(number) * size) for number, size in zip(numbers, _UNITS.values(), strict=True))


def _why_not(text: str) -> str:
    """Say what is wrong with a duration where a likely wish can be guessed."""
    if re.fullmatch(r"[0-9.]+", text):
        return f"which has no unit: write {text}s or {text}min"
    if match := re.fullmatch(r"([0-9]+):([0-5][0-9])", text):
        return f"which could be hours or minutes: write {text}:00 or {match[1]}min{match[2]}s"
    spelled = _LONE_M.sub(r"\1min", text)
    if spelled != text and _milliseconds(spelled) is not None:
        return f"where m is ambiguous: write {spelled}"
    return ""
