"""Local variables of the user's functions: a resume does not bring them back, so it says which ones it misses.

A checkpoint holds a fingerprint of the plain values and small tensors that the functions on the stack had in
their variables. When a resumed function has come to the same place, those that it has too must be equal. So
a best score, a running sum, an RNN's hidden state, or a batch that a prefetching generator had already
taken, is named in a warning instead of changing the training silently. A counter that begins again at 0,
as that of ``enumerate(loader)``, is named one turn later.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import xxhash

_SMALL = 1 << 16  # elements of a tensor, or items of a container, that are looked at
_ABSENT = "?"
_CLOCK = 1.5e9

Seen = dict[str, dict[str, Any]]  # of each function on the stack: variable -> fingerprint


def seen() -> Seen:
    """Return what the user's functions that are running have in their variables."""
    return {frame.f_code.co_name: _of_frame(frame) for frame in _users_frames()}


def _of_frame(frame: FrameType) -> dict[str, Any]:
    variables = frame.f_locals
    found = {name: _fingerprint(value) for name, value in variables.items()}
    if type(variables) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        variables.clear()  # before Python 3.13 a copy, which would keep iterators and batches alive
    return {name: value for name, value in found.items() if value != _ABSENT}


def _users_frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    inside = True  # still in chainrun, on the way out to the user's function
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        ours = module == "chainrun" or module.startswith("chainrun.")
        if ours and not inside:
            return
        if not ours:
            inside = False
            if frame.f_code.co_name == "<module>":
                return
            if "site-packages" not in frame.f_code.co_filename:
                yield frame
        frame = frame.f_back


def _fingerprint(value: Any, depth: int = 3) -> Any:
    """Return a plain value itself, a hash of what is bigger, `_ABSENT` for objects."""
    if type(value) in (bool, int, float, str, type(None)):
        return value if not isinstance(value, str) else f"'{value[:80]}'"
    if isinstance(value, torch.Tensor):
        known = f"tensor {tuple(value.shape)} {value.dtype} {value.device.type}"
        if value.device.type != "cpu" or value.numel() > _SMALL or value.layout != torch.strided:
            return known  # to read it would take time, or wait for the device
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{known} {xxhash.xxh3_64_hexdigest(data)}"
    if type(value) in (list, tuple, dict) and depth and len(value) <= _SMALL:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [(key, _fingerprint(item, depth - 1)) for key, item in items]
        if all(part != _ABSENT for _, part in parts):
            return f"{type(value).__name__} {len(parts)} {xxhash.xxh3_64_hexdigest(repr(parts).encode())}"
    return _ABSENT


def differences(saved: Seen, now: Seen) -> list[str]:
    """Return what a resumed function has otherwise, in words."""
    return [
        f"{name} of {function}() ({_show(saved[function][name])} → {_show(value)})"
        for function, variables in now.items()
        for name, value in variables.items()
        if name in saved.get(function, {}) and not _same(saved[function][name], value)
    ]


def restarted(saved: Seen, now: Seen, handed_out: int) -> list[str]:
    """Return the counters that follow a loader's batches and began again.

    Args:
        saved: the variables at a loader's head, after `handed_out` batches of the pass.
        now: at its next head, one batch later, in the resumed function.
    """
    return [
        f"{name} of {function}() ({before} → {value})"
        for function, variables in now.items()
        for name, value in variables.items()
        if type(value) is int
        and type(before := saved.get(function, {}).get(name)) is int
        and handed_out > 1
        and before - value == handed_out - 1
    ]


def _same(a: Any, b: Any) -> bool:
    if type(a) is float and type(b) is float and min(a, b) > _CLOCK:
        return True  # readings of time.time()
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _show(value: Any) -> str:
    return str(value).rpartition(" ")[0] if str(value).count(" ") > 1 else str(value)
