"""README.md and docs/ say what is so: their commands are run, their code is run, their links lead somewhere.

A `console` block is a transcript: commands after `$`, then what they print, in which `…` stands for anything and a
number for any number. Commands of one README are run in one folder, in the README's order.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from chain import Segment

from chainrun import cli, sweep
from chainrun.training.stop import SegmentEnd

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "slurm" / "README.md"]
SHORT_DEMO = """python -c 'import pathlib, sys
from chainrun import demo
demo.OVERRIDES.append("args.epochs=10")
sys.exit(demo.demo(pathlib.Path("demo")))'"""
MADE = {"make demo": SHORT_DEMO, "make test": "", "make crash": "", "make check": ""}
"""What the README says of make, and what is run in its place: `make` would set up the environment of this test,
and the demo's full length is not needed to see that it says what it says."""


@dataclass
class Block:
    """A fenced block: its language and text, the heading that it is under."""

    language: str
    text: str
    heading: str


@dataclass
class Command:
    """A line after `$`, and the lines that it prints."""

    line: str
    heading: str
    expected: list[str] = field(default_factory=list)


def blocks(path: Path) -> Iterator[Block]:
    heading, inside, found = "", None, []
    for line in path.read_text().splitlines():
        if line.startswith("```"):
            if inside is None:
                inside, found = line[3:].strip(), []
            else:
                yield Block(inside, "\n".join(found), heading)
                inside = None
        elif inside is not None:
            found.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def commands() -> list[Command]:
    found: list[Command] = []
    for block in blocks(README):
        if block.language == "console":
            for line in block.text.splitlines():
                if line.startswith("$ "):
                    found.append(Command(line[2:], block.heading))
                else:
                    found[-1].expected.append(line)
    return found


def pattern(lines: list[str]) -> str:
    """Return the regular expression of a transcript's lines."""
    parts = []
    for line in lines:
        if line.strip() == "…":
            parts.append(r"(?:.*\n)*?")
            continue
        words = [re.sub(r"\d+(?:\\\.\d+)?", r"\\d+(?:\\.\\d+)?", re.escape(part)) for part in line.split("…")]
        words = [re.sub(r"segments?\b", "segments?", word) for word in words]
        parts.append(re.sub(r"(?:\\ )+", r"\\s+", ".*".join(words)) + r"\s*\n")
    return "".join(parts)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder in which the README is followed, and the environment."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return folder, {**os.environ, "PATH": path}


def follow(command: Command, folder: Path, environment: dict[str, str]) -> None:
    """Run a command and compare what it prints with what the README says."""
    line = MADE.get(command.line, command.line)
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, f"$ {line}\n{done.stdout}"
    # lines that only a slow machine prints
    kept = [said for said in done.stdout.splitlines() if not re.match(r"chainrun: segment \d+, step", said)]
    said = "".join(f"{line}\n" for line in kept)
    expected = command.expected
    if command.line == "make demo":  # where the walltime cuts, and how often, is the machine's
        expected = [
            re.sub(r"^chainrun: (segment \d+ (stops|resumes)|segment \d+: res|witnessed).*", "…", e)
            for e in expected
        ]
    assert re.fullmatch(pattern(expected), said), f"$ {line}\n{said}"


LOCAL = [c for c in commands() if c.heading != "On SLURM"]
CLUSTER = [c for c in commands() if c.heading == "On SLURM"]


def test_the_commands_of_the_readme_do_what_it_says(place):
    """Everything that needs no cluster, in order, one run directory for all."""
    folder, environment = place
    assert len(LOCAL) >= 7
    for command in LOCAL:
        follow(command, folder, environment)


@pytest.mark.slurm
def test_the_cluster_commands_of_the_readme_do_what_it_says(slurm_cluster, place):
    """doctor, dry run, submission, status and logs, against a real SLURM."""
    folder, environment = place
    assert len(CLUSTER) >= 4
    for command in CLUSTER:
        follow(command, folder, {**slurm_cluster.env, "PATH": environment["PATH"]})


def test_the_four_lines_train_and_go_on(tmp_path):
    """The README's first block, with the digits example's parts, cut and resumed ends as it does uncut."""
    (text,) = [block.text for block in blocks(README) if "(1) drop-in" in block.text]
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        digits = types.SimpleNamespace(**vars(__import__("digits")))
    finally:
        sys.path.pop(0)
    names = {
        "Net": digits.Net,
        "Digits": lambda train: digits.Digits(train=train, most=400),
        "evaluate": lambda model: digits.evaluate(model, digits.Digits(train=False), "cpu"),
    }
    for number in range(1, 5):
        assert f"# ({number})" in text
    text = text.replace("num_workers=4", "num_workers=0")
    exec(compile(text, str(README), "exec"), names)
    results = []
    for name, cuts in (("whole", []), ("cut", [3, 7])):
        for _ in range(len(cuts) + 1):
            with Segment(tmp_path / name, cuts) as run, contextlib.suppress(SegmentEnd):
                result = names["train"](run, epochs=2)
        results.append((result, (tmp_path / name / "metrics.jsonl").read_text()))
    assert results[0] == results[1]
    assert results[0][1].count("\n") == 14 + 2


def test_python_blocks_after_the_first_are_whole_programs(place):
    """As a script in the README's folder they end well."""
    folder, environment = place
    programs = [b.text for b in blocks(README) if b.language == "python" and "def train" not in b.text]
    assert programs
    for text in programs:
        done = subprocess.run(
            [sys.executable, "-c", text],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("done [")


def test_every_block_is_of_a_kind_that_is_tested():
    """Code cannot hide in a block without a language: there, only make's commands and drawings."""
    for block in blocks(README):
        if block.language == "":
            first = block.text.split()[0]
            assert first in ("segment", "runs/digits/", "make"), block.text
            for line in block.text.splitlines() if first == "make" else []:
                assert line.split("#")[0].strip() in MADE
        else:
            assert block.language in ("python", "yaml", "console"), block.language


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_commands_and_links_in_the_documents_are_right(path, tmp_path):
    """YAML is a valid experiment, or a part of one; every command's words parse; files that are linked are there."""
    for block in blocks(path):
        if block.language == "yaml":
            data = yaml.safe_load(block.text)
            file = tmp_path / "x.yaml"
            file.write_text(yaml.safe_dump({"name": "x", "function": "x.py:train", **data}))
            sweep.load(file)
        for line in block.text.splitlines() if block.language in ("", "console", "sh", "bash") else []:
            words = shlex.split(line.removeprefix("$ "), comments=True) if "chainrun " in line[:11] else []
            if words[:1] == ["chainrun"]:
                cli._parser().parse_known_args(words[1:])  # ends with 2 where a word is wrong
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path}: {target}"


def messages() -> str:
    """Return every text in chainrun, one a line, with a gap where a value is filled in."""
    found = []
    for path in sorted((ROOT / "chainrun").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in found)


def test_the_messages_under_troubleshooting_are_chainruns():
    """Each message in the table is a text in the source, numbers and names left open."""
    table = README.read_text().partition("## Troubleshooting")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    texts = messages()
    assert len(rows) >= 10
    for row in rows:
        for message in re.findall(r"`([^`]+)`", row.split("|")[1]):
            parts = re.split(r"…|\d+", message)
            wanted = ".*?".join(re.escape(part.strip()) for part in parts)
            assert re.search(wanted, texts), message
