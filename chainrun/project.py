"""The project of a function: which files belong to it, and what they hold now.

It is the git repository that holds the function: tracked files, also modified ones, and untracked ones that git
does not ignore. Where there is none it is the Python files of the function's folder. A function of an installed
package has no project; the package's version stands for it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import xxhash

from chainrun.function import FunctionSource

LARGE = 5_000_000  # bytes; a larger file is data
MOST_BYTES, MOST_FILES = 100_000_000, 20_000  # of a project; of a larger one only Python files are copied
_IMPORTABLE = (".py", ".so")
_PROSE = (".md", ".rst")
# an experiment file is frozen, and compared, as experiment.yaml
_EXPERIMENT = re.compile(rb"^[\s{\"']*function[\"']?\s*:", re.MULTILINE)
_MOST_FOLDERS = 500  # that are looked through where there is no git
_PATIENCE = 20.0  # seconds for git


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
    copies: list[Path] = field(default_factory=list, compare=False)
    """Where it was copied to already, as for other runs of a sweep: their files are shared."""


def survey_source(source: FunctionSource, runs: Path) -> Project:
    """Look at the project of a function as it is now; copies nothing.

    Args:
        runs: the folder of runs, which is no part of the project.
    """
    if source.path is None or _is_installed(source.path):
        return installed(source)
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
    files, large = _measure(root, _without_runs(names))
    return Project(source, root, files, large, git_state(root), keep_out=keep_out)


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
        for entry in entries(root / folder):
            name = os.path.join(folder, entry.name)
            if name.endswith(_IMPORTABLE) and name not in known and entry.is_file():
                found.append(name)
    return found


def _python_below(home: Path) -> list[str]:
    """List the Python files of a folder and those below it; of a very large tree only the folder's own."""
    found: list[str] = []
    folders = [""]
    for number, folder in enumerate(folders):  # grows on the way
        here = list(entries(home / folder))
        names = {entry.name for entry in here}
        if folder and names & {"journal.jsonl", "pyvenv.cfg", "conda-meta"}:  # a run, another Python
            continue
        for entry in here:
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


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder, sorted, without hidden files and caches."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return
    yield from (one for one in entries if not one.name.startswith(".") and one.name != "__pycache__")


def _without_runs(names: list[str]) -> list[str]:
    """Drop files of runs and of groups of runs: git lists those too, where it was not told to ignore them."""
    marks = {"journal.jsonl", "sweep.json"}
    runs = {os.path.dirname(name) for name in names if os.path.basename(name) in marks}
    return [name for name in names if not runs & {str(above) for above in PurePath(name).parents}]


def _measure(root: Path, names: list[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the files that are code, with their hashes, and those that are too large to be copied."""
    sizes = {}
    for name in names:
        path = root / name
        if path.is_file() and not name.endswith(_PROSE) and not is_chainrun(path):
            sizes[name] = path.stat().st_size
    small = [name for name, size in sizes.items() if size <= LARGE or name.endswith(_IMPORTABLE)]
    if sum(sizes[name] for name in small) > MOST_BYTES or len(small) > MOST_FILES:
        _say(
            f"the project {root} has more than {MOST_FILES} files or {MOST_BYTES // 10**6} MB: only its Python files "
            "are frozen, the others are linked; let git ignore what is data"
        )
        small = [name for name in small if name.endswith(_IMPORTABLE)]
    files = {}
    for name in small:
        try:
            content = (root / name).read_bytes()
        except OSError:  # what cannot be read is linked, and fails for who needs it
            continue
        if not (name.endswith((".yaml", ".yml")) and _EXPERIMENT.search(content)):
            files[name] = hash_of(content)
    return files, tuple(name for name, size in sizes.items() if size > LARGE and name not in files)


def hash_of(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def is_chainrun(path: Path) -> bool:
    here = Path(__file__).resolve().parent
    return path == here or here in path.parents


@functools.cache
def _library() -> tuple[Path, ...]:
    return tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib"))


def _is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package, and not to somebody's project."""
    if {"site-packages", "dist-packages"} & set(path.parts) or is_chainrun(path.resolve()):
        return True
    return any(folder in path.resolve().parents for folder in _library())


def installed(source: FunctionSource) -> Project:
    top = (source.module or "").partition(".")[0]
    names = importlib.metadata.packages_distributions().get(top, []) if top else []
    found = {name: importlib.metadata.version(name) for name in dict.fromkeys(names)}
    if source.path is not None:
        found[str(source.path)] = hash_of(source.path.read_bytes())
    return Project(source, source.path.parent if source.path else Path.cwd(), installed=found)


def _say(line: str) -> None:
    print(f"chainrun: {line}", file=sys.stderr)
