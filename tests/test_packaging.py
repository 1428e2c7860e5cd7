"""What is installed from the wheel and the sdist is chainrun, on every Python that it names."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import chainrun
from chainrun import rundir
from chainrun.checkpoint import store

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command outside of the checkout; return what it said."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, with the hatchling that is here: no network."""
    folder = tmp_path_factory.mktemp("built")
    build = (
        "import os, sys; from hatchling import build; os.chdir(sys.argv[1]); "
        "getattr(build, 'build_' + sys.argv[2])(sys.argv[3])"
    )
    run(sys.executable, "-c", build, ROOT, "sdist", folder, cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(sys.executable, "-c", build, folder / sdist.name.removesuffix(".tar.gz"), "wheel", folder, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_wheel_and_the_sdist_hold_what_they_should(built):
    """The package with its type marker and examples in the wheel; also tests, docs and scripts in the sdist."""
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
    for name in ("cli.py", "py.typed", "_examples/digits.yaml", "_examples/trackers/with_wandb.py"):
        assert f"chainrun/{name}" in names
    assert {name.split("/")[0] for name in names} == {
        "chainrun",
        f"chainrun-{chainrun.__version__}.dist-info",
    }
    assert "Requires-Python: >=3.10" in text
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "requirements.lock",
        "slurm/chain.sbatch",
    ):
        assert name in inside
    assert not any(name.startswith((".venv", "runs")) or "__pycache__" in name for name in inside)


def test_an_installed_wheel_runs_a_chain(built, tmp_path):
    """In a fresh environment that shares only the dependencies: version, a cut chain, status; types are found."""
    _, wheel = built
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    (site,) = environment.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:  # what `pip install --no-deps` does with a wheel of pure Python
        archive.extractall(site)
        (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "chainrun = chainrun.cli:main" in archive.read(entries).decode()
    python = environment / "bin" / "python"
    others = [path for path in sys.path if path.endswith("site-packages")]
    # behind the wheel's own place, and without the editable install's finder, which a .pth there would run
    (site / "others.pth").write_text("".join(f"{path}\n" for path in others))
    where = run(python, "-c", "import chainrun; print(chainrun.__file__)", cwd=tmp_path).strip()
    assert where == str(site / "chainrun" / "__init__.py")
    command = [python, "-m", "chainrun"]
    assert run(*command, "--version", cwd=tmp_path) == f"chainrun {chainrun.__version__}\n"
    example = site / "chainrun" / "_examples" / "article.yaml"
    words = ["args.workers=0", "args.epochs=1", "--interrupt-at", "4"]
    said = run(*command, "run", example, *words, cwd=tmp_path)
    assert "segment 2: resumes at step 4" in said
    assert re.search(r"article +done +12 ", run(*command, "status", cwd=tmp_path))


def test_versions_agree():
    """pyproject, the package and the changelog; the Pythons that are named are the ones that ruff holds us to."""
    project = (ROOT / "pyproject.toml").read_text()
    for line in (
        f'version = "{chainrun.__version__}"',
        'requires-python = ">=3.10"',
        'target-version = "py310"',
    ):
        assert f"\n{line}\n" in project
    log = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## \[(Unreleased|" + re.escape(chainrun.__version__) + r")\]", log, re.MULTILINE)
    assert f"| {chainrun.__version__.rpartition('.')[0]} | {rundir.FORMAT} | {store.FORMAT} |" in log


def test_the_package_is_python_3_10():
    """Its grammar is 3.10's, and nothing is imported from the standard library that came later."""
    later = {"tomllib", "asyncio.taskgroups", "compression", "string.templatelib", "annotationlib"}
    names = {
        ("typing", n) for n in ("Self", "assert_never", "Never", "override", "reveal_type", "LiteralString")
    }
    names |= {("enum", "StrEnum"), ("datetime", "UTC"), ("contextlib", "chdir"), ("itertools", "batched")}
    for path in [*(ROOT / "chainrun").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        tree = ast.parse(path.read_text(), str(path), feature_version=(3, 10))
        for node in ast.walk(tree):
            assert not isinstance(node, getattr(ast, "TryStar", ())), path
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & later, path
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in later, path
                assert not {(node.module, alias.name) for alias in node.names} & names, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in names, path
