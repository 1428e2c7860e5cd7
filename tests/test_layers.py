"""The layers of the package: each file imports only from its own layer and those below."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "chainrun"

# lowest first; a file belongs to the layer whose pattern it matches
LAYERS = [
    (
        "base",
        [
            "errors",
            "durations",
            "yamlfile",
            "experiment",
            "function",
            "project",
            "owned",
            "snapshot",
            "shipped",
            "sweep",
            "rundir",
            "journal",
            "breakers",
            "lock",
            "allocation",
            "pace",
        ],
    ),
    ("checkpoint", ["checkpoint.*"]),
    ("training", ["training.*"]),
    ("segment", ["segment"]),
    ("launching", ["launch.*"]),
    (
        "commands",
        [
            "status",
            "status_of_one",
            "logs",
            "inspect_runs",
            "inspect_checkpoint",
            "report.*",
            "demo",
            "cli",
            "__main__",
            "__init__",
        ],
    ),
]


def layer_of(module: str) -> int:
    for number, (_, patterns) in enumerate(LAYERS):
        for pattern in patterns:
            if module == pattern or (pattern.endswith("*") and (module + ".").startswith(pattern[:-1])):
                return number
    raise AssertionError(f"chainrun/{module} belongs to no layer: add it to tests/test_layers.py")


def imports_of(path: Path) -> set[str]:
    """The chainrun modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                file = PACKAGE.parent / (name.replace(".", "/") + ".py")
                found.add(name if file.exists() else node.module)
    return {name.removeprefix("chainrun.") for name in found if name.startswith("chainrun.")}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_point_downwards(path: Path) -> None:
    """No file imports from a layer above its own."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if module == "__init__":
        return  # re-exports the public names lazily
    for imported in imports_of(path):
        if layer_of(imported) > layer_of(module):
            raise AssertionError(f"chainrun/{module} ({LAYERS[layer_of(module)][0]}) imports {imported}")


def test_looking_commands_do_not_import_torch() -> None:
    """What status, logs and --help need is importable without torch, NumPy and submitit."""
    code = (
        "import sys, chainrun.cli, chainrun.inspect_runs, chainrun.status_of_one, chainrun.logs, chainrun.report,"
        "chainrun.launch.submit, chainrun.launch.cancel;"
        "print([m for m in ('torch', 'numpy', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
