"""What the documents say is there."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS.parent / "docs" / "exactness.md"


def rows() -> list[tuple[str, str, str]]:
    """Return construct, result and test of each row that is no heading."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]
    return [(row[0], row[1], row[2]) for row in cells if not row[0].startswith("**")]


def test_each_row_of_the_table_names_a_test_that_is_there():
    """`file::test[case]`: the file has the function, it is a test, and the case is a text or a function's name in it."""
    problems = []
    for construct, _, test in rows():
        match = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)(?:\[([^\]]+)\])?`", test)
        if match is None or not (TESTS / match[1]).exists():
            problems.append(f"{construct}: {test} is not file::test of a file in tests/")
            continue
        tree = ast.parse((TESTS / match[1]).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        if match[2] not in functions:
            problems.append(f"{construct}: {match[1]} has no {match[2]}")
        elif match[3] is not None and match[3] not in texts | functions:
            problems.append(f"{construct}: {match[2]} has no case '{match[3]}'")
    assert problems == []


def test_each_row_says_exact_refused_or_not_restored():
    """Every result begins with one of the three words, and no construct is there twice."""
    found = rows()
    assert len(found) > 50
    for construct, result, _ in found:
        assert re.match(r"exact\b|refused\b|not restored: ", result), (construct, result)
    assert len({construct for construct, _, _ in found}) == len(found)


def test_the_api_reference_is_what_the_docstrings_say():
    """docs/api.md is what docs/api.py writes; every public name, method and property is in it."""
    spec = importlib.util.spec_from_file_location("api", TABLE.with_name("api.py"))
    assert spec is not None and spec.loader is not None
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    assert TABLE.with_name("api.md").read_text() == api.render(), "run: python docs/api.py"
