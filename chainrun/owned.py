"""Whose code something is: the user's own, installed, or Python's."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

FOREIGN = {*sys.stdlib_module_names, "torch", "numpy", "chainrun"}
"""Packages whose objects keep no state of the user's."""

RECORDS = (types.SimpleNamespace, argparse.Namespace)
"""Classes of Python's whose objects hold what the user gives them, under names."""

_PYTHONS = sysconfig.get_paths()["stdlib"] + os.sep


def top(module: Any) -> str:
    """Return the name of the package that a module of this name is in."""
    return str(module or "builtins").partition(".")[0]


def is_users_module(module: types.ModuleType) -> bool:
    file = vars(module).get("__file__")
    if not isinstance(file, str) or top(vars(module).get("__name__")) in FOREIGN:
        return False
    return _is_users_file(file)


@functools.cache  # asked of every function at every look
def _is_users_file(file: str) -> bool:
    installed = {"site-packages", "dist-packages"} & {*Path(file).parts}
    return not installed and not file.startswith(_PYTHONS)


def is_users_own(thing: Any) -> bool:
    """Whether a class or a function is of the user's own code, neither installed nor Python's."""
    name = thing.__module__
    return type(name) is str and name in sys.modules and is_users_module(sys.modules[name])


def fields(value: Any) -> list[tuple[str, Any]]:
    """Return an object's own attributes, those in slots too; no code of the user's runs."""
    found: dict[str, Any] = {}
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if type(slot) is types.MemberDescriptorType and name != "__dict__":
                try:
                    found[name] = slot.__get__(value)
                except AttributeError:  # not bound
                    continue
    try:
        own = object.__getattribute__(value, "__dict__")
    except AttributeError:
        own = {}
    return [*found.items(), *(own.items() if type(own) is dict else ())]
