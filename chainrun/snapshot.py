"""What runs is what was submitted: the function's project, copied into ``code/`` of the run directory.

The project is the git repository that holds the function: tracked files, also modified ones, and untracked ones
that git does not ignore. Where there is none it is the Python files of the function's folder. What is not copied
(data, large files, what git ignores) is linked from its place, so that paths beside a file go on to work.

``code.json`` says what was frozen::

    source     path (in code/, or absolute where nothing was copied), module, name: the function
    root       where the project is
    files      path -> hash of what was copied
    git        git_commit, git_changes: as in a checkpoint's manifest
    installed  package -> version, where the function belongs to an installed package, which is not copied
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import xxhash

from chainrun.function import FunctionSource
from chainrun.rundir import RunDir, fsync_dir, read_json, write_durably

LARGE = 5_000_000  # bytes; a larger file is data
MOST_BYTES, MOST_FILES = 100_000_000, 20_000  # of a project; of a larger one only Python files are copied
_IMPORTABLE = (".py", ".so")
_MOST_FOLDERS = 500  # that are looked through where there is no git
_MOST_LINKS = 1000  # beside the files of one folder
_PATIENCE = 20.0  # seconds for git
_SHOWN = 10


@dataclass(frozen=True)
class Project:
    """The function and its project as they are now."""

    source: FunctionSource
    root: Path
    """The folder that `files` are relative to."""
    files: dict[str, str] = field(default_factory=dict)
    """Relative path -> hash."""
    large: tuple[str, ...] = ()
    """Files that are linked, since they are large."""
    git: dict[str, str] = field(default_factory=dict)
    installed: dict[str, str] = field(default_factory=dict)
    keep_out: Path | None = None
    """A folder of runs inside of the project."""


def survey(source: FunctionSource, runs: Path) -> Project:
    """Look at the project of a function as it is now; copies nothing.

    Args:
        runs: the folder of runs, which is no part of the project.
    """
    if source.path is None or _is_installed(source.path):
        return _installed(source)
    home = source.path.parent
    if source.module:
        home = source.path.parents[source.module.count(".") + (source.path.name == "__init__.py")]
    return survey_folder(source, home, source.path, runs)


def survey_folder(source: FunctionSource, home: Path, file: Path | None, runs: Path) -> Project:
    """Look at the project that holds a folder; `file` must be in it, where one is given."""
    home = home.resolve()
    file = file and file.parent.resolve() / file.name
    listed = _listed_by_git(home)
    if listed is not None and (file is None or file in {listed[0] / name for name in listed[1]}):
        root, names = listed
        names += _importable_beside(root, names)
    else:
        root, names = home, _python_below(home)
    keep_out = runs.resolve()
    if keep_out == root or root not in keep_out.parents or keep_out in (file or root).parents:
        keep_out = root / ".git"
    names = [name for name in names if keep_out not in (root / name).parents]
    files, large = _measure(root, _without_runs(names), file)
    return Project(source, root, files, large, git_state(root), keep_out=keep_out)


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
        try:
            content = (project.root / name).read_bytes()
            to.write_bytes(content)
            shutil.copymode(project.root / name, to)
        except FileNotFoundError:  # it has gone since it was listed
            continue
        files[name] = _hash(content)
    _link_the_rest(new, project, files)
    if run.code.exists():
        os.rename(run.code, old)
    os.rename(new, run.code)
    shutil.rmtree(old, ignore_errors=True)
    fsync_dir(run.path)
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
    return differences(run, _installed(source))


def git_state(folder: Path) -> dict[str, str]:
    """Return the commit of a folder's repository and a hash of its uncommitted changes; empty without git."""
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "diff", "HEAD")
    if commit is None or changes is None:
        return {}
    digest = hashlib.sha256(changes).hexdigest()[:12] if changes else "none"
    return {"git_commit": commit.decode().strip(), "git_changes": digest}


def _git(folder: Path, *words: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, timeout=_PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _listed_by_git(folder: Path) -> tuple[Path, list[str]] | None:
    top = _git(folder, "rev-parse", "--show-toplevel")
    if not top:
        return None
    root = Path(os.fsdecode(top.rstrip(b"\n"))).resolve()
    tracked = _git(root, "ls-files", "-z", "--cached", "--recurse-submodules")
    others = _git(root, "ls-files", "-z", "--others", "--exclude-standard")
    if tracked is None or others is None:
        return None
    return root, list(dict.fromkeys(os.fsdecode(tracked + others).split("\0")[:-1]))


def _importable_beside(root: Path, names: Iterable[str]) -> list[str]:
    """Find what can be imported beside Python files though git ignores it: built extensions, `_version.py`."""
    known = set(names)
    folders = {os.path.dirname(name) for name in known if name.endswith(".py")}
    found = []
    for folder in sorted(folders):
        for entry in _entries(root / folder):
            name = os.path.join(folder, entry.name)
            if name.endswith(_IMPORTABLE) and name not in known and entry.is_file():
                found.append(name)
    return found


def _python_below(home: Path) -> list[str]:
    """List the Python files of a folder and those below it; of a very large tree only the folder's own."""
    found: list[str] = []
    folders = [""]
    for number, folder in enumerate(folders):  # grows on the way
        entries = list(_entries(home / folder))
        names = {entry.name for entry in entries}
        if folder and names & {"journal.jsonl", "pyvenv.cfg", "conda-meta"}:  # a run, another Python
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif name.endswith(_IMPORTABLE) and entry.is_file():
                found.append(name)
        if number >= _MOST_FOLDERS or len(found) > MOST_FILES:
            _say(
                f"{home} is in no git repository and holds very many folders: only the Python files directly in it "
                "are frozen; with `git init` there, the project's files are"
            )
            return [name for name in found if not os.path.dirname(name)]
    return found


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder, sorted, without hidden files and caches."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return
    yield from (one for one in entries if not one.name.startswith(".") and one.name != "__pycache__")


def _without_runs(names: list[str]) -> list[str]:
    """Drop files of run directories: git lists those too, where it was not told to ignore them."""
    runs = {os.path.dirname(name) for name in names if os.path.basename(name) == "journal.jsonl"}
    return [name for name in names if not runs & {str(above) for above in PurePath(name).parents}]


def _measure(root: Path, names: list[str], function: Path | None) -> tuple[dict[str, str], tuple[str, ...]]:
    sizes = {}
    for name in names:
        path = root / name
        if path.is_file() and not _is_chainrun(path):
            sizes[name] = path.stat().st_size
    small = [name for name, size in sizes.items() if size <= LARGE or name.endswith(_IMPORTABLE)]
    if sum(sizes[name] for name in small) > MOST_BYTES or len(small) > MOST_FILES:
        _say(
            f"the project {root} has more than {MOST_FILES} files or {MOST_BYTES // 10**6} MB: only its Python files "
            "are frozen, the others are linked; let git ignore what is data"
        )
        small = [name for name in small if name.endswith(_IMPORTABLE)]
    files = {name: _hash((root / name).read_bytes()) for name in small}
    return files, tuple(name for name in sizes if name not in files)


def _link_the_rest(to: Path, project: Project, files: Iterable[str]) -> None:
    """Link what was not copied and lies beside what was: data that is found by `__file__`."""
    folders = {str(above) for name in files for above in PurePath(name).parents}
    for folder in folders:
        links = []
        for entry in _entries(project.root / folder):
            path = Path(entry.path)
            marks = ("journal.jsonl", "pyvenv.cfg", "conda-meta")
            if (
                path != project.keep_out
                and not _is_chainrun(path)
                and not any((path / m).exists() for m in marks)
            ):
                links.append(path)
            if len(links) > _MOST_LINKS:
                break
        for path in links if len(links) <= _MOST_LINKS else []:
            link = to / folder / path.name
            if not os.path.lexists(link):
                link.symlink_to(path)


def _hash(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def _is_chainrun(path: Path) -> bool:
    here = Path(__file__).resolve().parent
    return path == here or here in path.parents


@functools.cache
def _library() -> tuple[Path, ...]:
    return tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))


def _is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package, and not to somebody's project."""
    if {"site-packages", "dist-packages"} & set(path.parts) or _is_chainrun(path.resolve()):
        return True
    return any(folder in path.resolve().parents for folder in _library())


def _installed(source: FunctionSource) -> Project:
    top = (source.module or "chainrun").partition(".")[0]
    names = importlib.metadata.packages_distributions().get(top, [])
    found = {name: importlib.metadata.version(name) for name in dict.fromkeys(names)}
    if source.path is not None:
        found[str(source.path)] = _hash(source.path.read_bytes())
    return Project(source, source.path.parent if source.path else Path.cwd(), installed=found)


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


def _say(line: str) -> None:
    print(f"chainrun: {line}", file=sys.stderr)
