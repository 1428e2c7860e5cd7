"""What runs is what was submitted: the function's project, copied into ``code/`` of the run directory.

What is not copied (data, large files, what git ignores) is linked from its place, so that paths beside a file go on
to work.

``code.json`` says what was frozen::

    source     path (in code/, or absolute where nothing was copied), module, name: the function
    root       where the project is
    files      path -> hash of what was copied
    git        git_commit, git_changes: as in a checkpoint's manifest
    installed  package -> version, where the function belongs to an installed package, which is not copied
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from chainrun.function import FunctionSource
from chainrun.project import Project, entries, hash_of, installed, is_chainrun
from chainrun.rundir import RunDir, fsync_dir, read_json, write_durably

_MOST_LINKS = 1000  # beside the files of one folder
_SHOWN = 10


def freeze(run: RunDir, project: Project) -> None:
    """Copy a project into the run directory, in place of what was frozen there before."""
    new, old = run.code.with_name(".code.new"), run.code.with_name(".code.old")
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    new.mkdir()
    files = {}
    for name in project.files:
        to = new / name
        to.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError):
            if project.copies:
                os.link(project.copies[0] / name, to)
                files[name] = project.files[name]
                continue
        try:
            content = (project.root / name).read_bytes()
            to.write_bytes(content)
            shutil.copymode(project.root / name, to)
        except FileNotFoundError:  # it has gone since it was listed
            continue
        files[name] = hash_of(content)
    _link_the_rest(new, project, files)
    if run.code.exists():
        os.rename(run.code, old)
    os.rename(new, run.code)
    shutil.rmtree(old, ignore_errors=True)
    fsync_dir(run.path)
    if files == project.files:  # else they have changed meanwhile
        project.copies.append(run.code)
    source = project.source
    path = source.path and str(source.path)
    if path and files:
        path = str((Path(path).parent.resolve() / Path(path).name).relative_to(project.root))
    frozen = {
        "source": {"path": path, "module": source.module, "name": source.name},
        "root": str(project.root),
        "files": files,
        "large": project.large,
        "git": project.git,
        "installed": project.installed,
    }
    write_durably(run.frozen, json.dumps(frozen, indent=1).encode())
    write_durably(run.environment, json.dumps(_environment(), indent=1).encode())


def differences(run: RunDir, project: Project) -> list[str]:
    """List how a project differs from what is frozen, as lines like `train.py: changed`."""
    frozen = read_json(run.frozen)
    if frozen is None:
        return []
    lines = []
    then, now = frozen["files"], project.files
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            what = "new" if name not in then else "deleted" if name not in now else "changed"
            lines.append(f"{name}: {what}")
    then, now = frozen["installed"], project.installed
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            lines.append(f"{name}: {then.get(name, 'not set')} -> {now.get(name, 'not set')}")
    return lines


def shorten(lines: Sequence[str]) -> str:
    """Return lines for a message, indented, a long list cut."""
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "".join(f"\n  {line}" for line in [*lines[:_SHOWN], *more])


def changed_packages(run: RunDir) -> list[str]:
    """List how Python and its packages differ from those at submission."""
    then = read_json(run.environment) or {}
    if not then:
        return []
    old, new = ({"python": f["python"], **f["packages"]} for f in (then, _environment()))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name}: {old.get(name, 'not there')} -> {new.get(name, 'not there')}" for name in names]


def frozen_source(run: RunDir) -> FunctionSource | None:
    """Return where the frozen function is, None for a run without frozen code."""
    frozen = read_json(run.frozen)
    if frozen is None:
        return None
    path = frozen["source"]["path"]
    if frozen["source"]["module"] == run.shipped.stem and run.shipped.exists():
        path = run.shipped.name
    return FunctionSource(path and run.code / path, frozen["source"]["module"], frozen["source"]["name"])


def frozen_git(run: RunDir) -> dict[str, str] | None:
    """Return the commit and the changes of the frozen code, None for a run without."""
    return (read_json(run.frozen) or {}).get("git")


def use(run: RunDir) -> None:
    """Make imports find the frozen files before those that they were copied from."""
    frozen = read_json(run.frozen)
    if not frozen or not (frozen["files"] or run.shipped.exists()):
        return
    root, source = Path(frozen["root"]), frozen_source(run)
    extra = _editable()
    if source and source.module and source.path:  # found beside the experiment, perhaps
        inside = source.path.parents[source.module.count(".") + (source.path.name == "__init__.py")]
        extra.append(str(root / inside.relative_to(run.code)))
    found = []
    for entry in [*sys.path, *extra]:
        folder = Path(os.path.abspath(entry)).resolve()
        if folder == root or root in folder.parents:
            inside = run.code / folder.relative_to(root)
            if inside.is_dir() and inside.resolve() == run.code.resolve() / folder.relative_to(root):
                found.append(str(inside))  # before the place it was copied from
        found.append(entry)
    sys.path[:] = [entry for entry in dict.fromkeys(found) if entry not in extra or entry in sys.path]


def installed_drift(run: RunDir) -> list[str]:
    """List how the function's installed package differs from the one at submission; nothing of it was copied."""
    source = frozen_source(run)
    if source is None or not (read_json(run.frozen) or {}).get("installed"):
        return []
    return differences(run, installed(source))


def _link_the_rest(to: Path, project: Project, files: Iterable[str]) -> None:
    """Link what was not copied and lies beside what was: data that is found by `__file__`."""
    keep_out = [project.keep_out, *project.keep_out.parents] if project.keep_out else []
    folders = {str(above) for name in files for above in PurePath(name).parents}
    for folder in folders:
        links = []
        for entry in entries(project.root / folder):
            path = Path(entry.path)
            marks = ("journal.jsonl", "pyvenv.cfg", "conda-meta")
            if path not in keep_out and not is_chainrun(path) and not any((path / m).exists() for m in marks):
                links.append(path)
            if len(links) > _MOST_LINKS:
                break
        for path in links if len(links) <= _MOST_LINKS else []:
            link = to / folder / path.name
            if not os.path.lexists(link):
                link.symlink_to(path)


def _editable() -> list[str]:
    """Return the folders of packages that setuptools has installed editable, by an import hook of its own."""
    hooks = [module for name, module in list(sys.modules.items()) if name.startswith("__editable__")]
    mappings = [getattr(hook, "MAPPING", {}) for hook in hooks]
    return [os.path.dirname(path) for mapping in mappings for path in mapping.values()]


def _environment() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "argv": sys.argv,
        "cwd": os.getcwd(),
        "host": socket.gethostname(),
        "time": round(time.time(), 3),
        "packages": _packages(),
    }


@functools.cache
def _packages() -> dict[str, str]:
    found = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    return dict(sorted(found.items()))
