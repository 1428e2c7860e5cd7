"""The experiment file, overrides, durations and the lookup of the user's function."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainrun import experiment
from chainrun.durations import format_duration, parse_duration
from chainrun.errors import ExperimentError
from chainrun.experiment import (
    ChainPolicy,
    Checkpoint,
    Experiment,
    Local,
    Slurm,
    Steps,
    diff,
    from_dict,
    load,
    to_yaml,
)
from chainrun.function import FunctionSource, check_arguments, find_function, load_function

FULL = """\
name: digits
function: digits.py:train
args: {lr: 1e-2, epochs: 20}
seed: 0
dir: runs
deterministic: false
checkpoint: {every: 15min, keep: 2}
chain:
  handoff: auto
  max_segments: 100
  stop_after_idle_segments: 2
  retry_errors: 0
slurm: {time: 4h, nodes: 1, tasks_per_node: 4, gpus_per_node: 4, cpus_per_task: 8, partition: gpu, lead: auto, setup: [], extra: {}}
local: {walltime: null, tasks: 1, lead: auto}
"""
SMALL = "function: digits.py:train\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in a folder of its own, and what it imports is forgotten after it."""
    modules, search = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = search
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(text: str, name: str = "exp.yaml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def message(call: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(ExperimentError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- durations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("4h", 14400),
        ("15min", 900),
        ("20s", 20),
        ("1h30min", 5400),
        ("1h 30min", 5400),
        (" 2 d ", 172800),
        ("1d 12h", 129600),
        ("1.5h", 5400),
        ("0.25s", 0.25),
        ("12:00:00", 43200),
        ("100:00:00", 360000),
        ("00:00:07", 7),
        ("1-12:00:00", 129600),
        ("1-12:30", 131400),
        ("7-0", 604800),
    ],
)
def test_a_duration_is_read_in_the_forms_of_people_and_of_slurm(text: str, seconds: float) -> None:
    """Units in descending order, clock times and SLURM's days-clock all mean seconds."""
    assert parse_duration(text, "key") == seconds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (90, "has no unit: write 90s or 90min"),
        ("90", "has no unit: write 90s or 90min"),
        (1.5, "has no unit: write 1.5s or 1.5min"),
        ("90m", "ambiguous: write 90min"),
        ("1h30m", "ambiguous: write 1h30min"),
        ("12:00", "hours or minutes: write 12:00:00 or 12min00s"),
        ("0s", "zero"),
        ("00:00:00", "zero"),
        ("0.0001s", "zero"),
        ("-5min", "negative"),
        (-5, "negative"),
        ("", "found ''"),
        ("soon", "found 'soon'"),
        ("30min1h", "found '30min1h'"),
        ("1-24:00:00", "found '1-24:00:00'"),
        ("12:60:00", "found '12:60:00'"),
        ("4 hours", "found '4 hours'"),
        (True, "found True"),
        (None, "found None"),
        (math.inf, "found inf"),
        ("9" * 400 + "d", "found"),
        ("\u0664h", "found"),
        (timedelta(hours=4), "found datetime.timedelta"),
    ],
)
def test_what_is_no_duration_is_refused_with_what_to_write(text: Any, words: str) -> None:
    """The error names the key, what was found, what is allowed and, where it can be guessed, the right form."""
    error = message(parse_duration, text, "slurm.time")
    assert error.startswith("slurm.time: found")
    assert words in error
    assert "allowed: a duration such as 2d, 4h" in error


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (20, "20s"),
        (90, "1min 30s"),
        (5400, "1h 30min"),
        (14400, "4h"),
        (129600, "1d 12h"),
        (3600.5, "1h 0.5s"),
        (59.9996, "1min"),
        (-5, "-5s"),
        (1e9, "11574d 1h 46min 40s"),
    ],
)
def test_a_duration_is_written_readably(seconds: float, text: str) -> None:
    """The largest units that fit come first and empty ones are left out."""
    assert format_duration(seconds) == text


@given(st.integers(1, 10**12))
def test_a_written_duration_reads_back_as_the_same_float(milliseconds: int) -> None:
    """parse(format(x)) is x, to the bit, for every millisecond."""
    seconds = milliseconds / 1000
    assert parse_duration(format_duration(seconds), "key") == seconds


@given(st.integers(0, 99), st.integers(0, 23), st.integers(0, 59), st.integers(1, 59))
def test_the_clock_and_the_unit_forms_agree(days: int, hours: int, minutes: int, seconds: int) -> None:
    """D-HH:MM:SS, HH:MM:SS and the sum of units are the same duration."""
    units = parse_duration(f"{days}d{hours}h{minutes}min{seconds}s", "key")
    assert units == parse_duration(f"{days}-{hours:02}:{minutes:02}:{seconds:02}", "key")
    assert units == parse_duration(f"{24 * days + hours}:{minutes:02}:{seconds:02}", "key")


@given(st.text(alphabet="0123456789.:-dhmins ", max_size=12))
def test_any_text_is_a_positive_duration_or_an_experiment_error(text: str) -> None:
    """Nothing that somebody types ends in another exception, in zero or below."""
    with contextlib.suppress(ExperimentError):
        assert 0 < parse_duration(text, "key") < math.inf


# ---- the file and the defaults ---------------------------------------------------------------------------


def test_the_file_of_the_documentation_is_read(folder: Path) -> None:
    """Every key of the user contract arrives in its field, with its type."""
    write("def train(run): ...\n", "digits.py")
    assert load(write(FULL)) == Experiment(
        name="digits",
        function=f"{folder}/digits.py:train",
        args={"lr": 0.01, "epochs": 20},
        seed=0,
        dir=folder / "runs",
        deterministic=False,
        checkpoint=Checkpoint(every=900.0, keep=2, keep_every=None),
        chain=ChainPolicy("auto", max_segments=100, stop_after_idle_segments=2, retry_errors=0),
        slurm=Slurm(14400.0, 1, 4, 4, 8, "gpu", "auto", (), {}),
        local=Local(None, 1, "auto"),
    )


def test_a_file_needs_nothing_but_a_function() -> None:
    """The name comes from the file's own name, the rest from the defaults; an empty section is all defaults."""
    small = load(write(SMALL, "digits-2.yaml"))
    assert small.name == "digits-2"
    assert small.slurm.time is None
    assert small.checkpoint == Checkpoint()
    assert small == load(write(SMALL + "args:\nslurm:\nlocal: {}\n", "digits-2.yaml"))
    assert small == load(write(SMALL, "digits-2.yml"))


def test_every_field_has_a_text_that_says_what_it_means() -> None:
    """The dataclasses are the documentation: below each field stands a string."""
    for section in (Steps, Checkpoint, ChainPolicy, Slurm, Local, Experiment, FunctionSource):
        source = Path(inspect.getfile(section)).read_text().splitlines()
        start = source.index(f"class {section.__name__}:")
        for one in dataclasses.fields(section):
            line = next(n for n in range(start, len(source)) if source[n].startswith(f"    {one.name}: "))
            assert source[line + 1].startswith('    """'), f"{section.__name__}.{one.name}"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-2", 0.01),
        ("1e5", 100000.0),
        ("1E-3", 0.001),
        ("1.e-3", 0.001),
        ("+1e+2", 100.0),
        (".5", 0.5),
        ("-.5e1", -5.0),
        ("-.inf", -math.inf),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", "010"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("12:00:00", "12:00:00"),
        ("2024-01-31", "2024-01-31"),
        ("=", "="),
        ("yes", True),
        ("~", None),
        ("'1e-2'", "1e-2"),
        ("[1e-2, 0.999]", [0.01, 0.999]),
    ],
)
def test_scalars_mean_what_they_look_like(written: str, value: Any) -> None:
    """Exponents make floats, with or without a dot; clock times, dates and leading zeros stay text."""
    for read in (
        load(write(f"{SMALL}args: {{x: {written}}}")),
        load(write(SMALL), [f"args.x={written}"]),
    ):
        assert read.args["x"] == value
        assert type(read.args["x"]) is type(value)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("checkpoint: {every: {steps: 1000}}", lambda e: e.checkpoint.every == Steps(1000)),
        ("checkpoint: {every: null}", lambda e: e.checkpoint.every is None),
        ("checkpoint: {keep_every: {steps: 5}}", lambda e: e.checkpoint.keep_every == Steps(5)),
        ("slurm: {time: 12:00:00, lead: 5min}", lambda e: (e.slurm.time, e.slurm.lead) == (43200, 300)),
        ("slurm: {time: 90s}", lambda e: e.slurm.time == 60),
        ("slurm: {setup: [module load cuda, 'a: b']}", lambda e: e.slurm.setup == ("module load cuda", "a: b")),
        ("slurm: {extra: {--mem_per_gpu: 4G, exclusive: true}}", lambda e: e.slurm.extra == {"mem-per-gpu": "4G", "exclusive": True}),
        ("slurm: {extra: {account: 0123, begin: 2030-01-01}}", lambda e: e.slurm.extra == {"account": "0123", "begin": "2030-01-01"}),
        ("local: {walltime: 20s, tasks: 2}", lambda e: e.local == Local(20.0, 2)),
        ("seed: null", lambda e: e.seed is None),
        ("seed: 4294967295", lambda e: e.seed == 2**32 - 1),
        ("a: &a {lr: 1}\nargs: {<<: *a, lr: 2}", None),
        ("args: {a: &a {lr: 1, x: 3}, b: {<<: *a, lr: 2}}", lambda e: e.args["b"] == {"lr": 2, "x": 3}),
        ("args: {a: &a [1], b: *a}", lambda e: e.args["a"] is not e.args["b"]),
    ],
)  # fmt: skip
def test_other_valid_values_are_read(text: str, read: Callable[[Experiment], bool] | None) -> None:
    """Each form that the contract allows arrives as documented; merge keys are not duplicates."""
    path = write(f"{SMALL}{text}\n")
    if read is None:
        assert "exp.yaml:2: a: unknown key" in message(load, path)
    else:
        assert read(load(path))


def test_the_directory_is_relative_to_the_command_and_the_function_to_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dir` belongs to the current directory, as in `status runs/`; `digits.py` to the experiment file first."""
    path = write(SMALL, "project/digits.yaml")
    write("", "project/digits.py")
    write("", "digits.py")
    write("", "elsewhere/other.py")
    found = load(path)
    assert found.function == f"{folder}/project/digits.py:train"
    assert found.dir == folder / "runs"
    assert found.run_dir == folder / "runs" / "digits"
    path = folder / path
    monkeypatch.chdir("elsewhere")
    assert load(path).run_dir == folder / "elsewhere" / "runs" / "digits"
    assert load(path, ["function=other.py:f"]).function == f"{folder}/elsewhere/other.py:f"
    monkeypatch.setenv("HOME", "/home/me")
    assert load(path, ["dir=~/runs"]).dir == Path("/home/me/runs")


# ---- errors in the file ----------------------------------------------------------------------------------

WRONG = [
    # line after SMALL, words of the error
    ("slurm: {tiem: 4h}", ["exp.yaml:2: slurm.tiem: unknown key (did you mean 'time'?)", "allowed: time, nodes"]),
    ("slurm: {account: me}", ["slurm.account: unknown key", "any others go under slurm.extra"]),
    ("lr: 0.1", ["exp.yaml:2: lr: unknown key", "allowed: name, function, args", "any others go under args"]),
    ("sede: 1", ["sede: unknown key (did you mean 'seed'?)"]),
    ("1: 2", ["1: unknown key"]),
    ("checkpoint:\n  evry: 4h", ["exp.yaml:3: checkpoint.evry: unknown key (did you mean 'every'?)", "every, keep"]),
    ("checkpoint: {every: {step: 4}}", ["checkpoint.every.step: unknown key (did you mean 'steps'?)"]),
    ("checkpoint: {every: {}}", ["exp.yaml:2: checkpoint.every.steps: missing", "whole number, at least 1"]),
    ("checkpoint: {every: {steps: 0}}", ["checkpoint.every.steps: found 0", "a whole number, at least 1"]),
    ("checkpoint: {every: 1000}", ["checkpoint.every: found 1000", "write 1000s", "or {steps: ...}", "or null"]),
    ("checkpoint: {every: [1]}", ["checkpoint.every: found [1]", "a duration", "{steps: ...}"]),
    ("checkpoint: {every: -1h}", ["checkpoint.every: found -1h, which is negative"]),
    ("checkpoint: {keep: 0}", ["checkpoint.keep: found 0", "at least 1"]),
    ("checkpoint: {keep: true}", ["checkpoint.keep: found true", "a whole number"]),
    ("checkpoint: {keep: 1.0}", ["checkpoint.keep: found 1.0", "a whole number"]),
    ("checkpoint: {keep: '2'}", ["checkpoint.keep: found '2'", "a whole number"]),
    ("checkpoint: {keep: null}", ["checkpoint.keep: found null", "a whole number"]),
    ("checkpoint: {keep_every: 4h}", ["checkpoint.keep_every: found 4h", "{steps: ...}, or null"]),
    ("chain: {handoff: reque}", ["found reque (did you mean 'requeue'?)", "auto | requeue | resubmit | ahead"]),
    ("chain: {handoff: [auto]}", ["chain.handoff: found [auto]", "auto | requeue | resubmit | ahead"]),
    ("chain: {max_node_hours: 0}", ["chain.max_node_hours: found 0", "a number of hours above 0"]),
    ("chain: {max_gpu_hours: 2h}", ["chain.max_gpu_hours: found 2h", "or null"]),
    ("chain: {max_segments: 0}", ["chain.max_segments: found 0", "at least 1"]),
    ("chain: {stop_after_idle_segments: 0}", ["chain.stop_after_idle_segments: found 0"]),
    ("chain: {retry_errors: -1}", ["chain.retry_errors: found -1", "at least 0"]),
    ("slurm: 4h", ["exp.yaml:2: slurm: found 4h", "allowed: {time: ..., nodes: ..."]),
    ("slurm: {time: 90}", ["slurm.time: found 90, which has no unit: write 90s or 90min", "or null"]),
    ("slurm: {time: 90m}", ["slurm.time: found 90m", "write 90min"]),
    ("slurm: {time: 30s}", ["slurm.time: found 30s, which is shorter than SLURM's unit, 1min"]),
    ("slurm: {time: 0h}", ["slurm.time: found 0h, which is zero"]),
    ("slurm:\n  time: 4h\n  lead: 4h", ["exp.yaml:4: slurm.lead: found 4h, with slurm.time 4h", "auto or a dur"]),
    ("slurm: {time: 119s, lead: 60s}", ["slurm.lead: found 1min, with slurm.time 1min"]),
    ("slurm: {lead: atuo}", ["slurm.lead: found atuo (did you mean 'auto'?)", "auto, or a duration"]),
    ("slurm: {lead: null}", ["slurm.lead: found null", "auto, or a duration"]),
    ("slurm: {nodes: 0}", ["slurm.nodes: found 0", "at least 1"]),
    ("slurm: {tasks_per_node: 0}", ["slurm.tasks_per_node: found 0", "at least 1"]),
    ("slurm: {gpus_per_node: -1}", ["slurm.gpus_per_node: found -1", "at least 0"]),
    ("slurm: {cpus_per_task: 0}", ["slurm.cpus_per_task: found 0", "or null"]),
    ("slurm: {partition: 2080}", ["slurm.partition: found 2080, which is text only in quotes"]),
    ("slurm: {partition: \"a\\nb\"}", ["slurm.partition", "one line of text"]),
    ("slurm: {partition: ''}", ["slurm.partition: found ''", "one line of text"]),
    ("slurm: {setup: module load cuda}", ["slurm.setup: found module load cuda", "a list of shell lines"]),
    ("slurm: {setup: [1]}", ["slurm.setup: found [1]", "a list of shell lines"]),
    ("slurm: {extra: [a]}", ["slurm.extra: found [a]", "a mapping from sbatch options"]),
    ("slurm: {extra: {mem: 1.5}}", ["slurm.extra.mem: found 1.5", "whole number", "quotes"]),
    ("slurm: {extra: {mem: null}}", ["slurm.extra.mem: found null"]),
    ("slurm: {extra: {comment: \"a\\n#SBATCH --wrap=x\"}}", ["slurm.extra.comment: found", "one line"]),
    ("slurm: {extra: {p: gpu}}", ["slurm.extra.p: found p", "a long option of sbatch"]),
    ("slurm: {extra: {Mem: 1}}", ["slurm.extra.Mem: found Mem", "a long option of sbatch"]),
    ("slurm: {extra: {mem-per-cpu: 1, --mem_per_cpu: 2}}", ["slurm.extra.--mem_per_cpu", "a second time"]),
    ("local: {walltime: 20}", ["local.walltime: found 20", "write 20s"]),
    ("local: {walltime: 20s, lead: 30s}", ["local.lead: found 30s, with local.walltime 20s"]),
    ("local: {tasks: 0}", ["local.tasks: found 0"]),
    ("seed: -1", ["seed: found -1", "at least 0 and at most 4294967295, or null"]),
    ("seed: 4294967296", ["seed: found 4294967296", "at most 4294967295"]),
    ("seed: true", ["seed: found true"]),
    ("seed: 1e3", ["seed: found 1000.0", "a whole number"]),
    ("deterministic: 1", ["deterministic: found 1", "true | false"]),
    ("deterministic: 'yes'", ["deterministic: found 'yes'", "true | false"]),
    ("name: a/b", ["name: found a/b", "letters, digits"]),
    ("name: ..", ["name: found ..", "letters, digits"]),
    ("name: .", ["name: found ."]),
    ("name: ''", ["name: found ''"]),
    ("name: -x", ["name: found -x"]),
    ("name: a%j", ["name: found a%j"]),
    ("name: 2024", ["name: found 2024, which is text only in quotes"]),
    (f"name: {'x' * 201}", ["name: found xxx", "longer than 200 bytes"]),
    ("dir: null", ["dir: found null", "a path"]),
    ("dir: 3", ["dir: found 3, which is text only in quotes"]),
    ("args: [1]", ["exp.yaml:2: args: found [1]", "from argument names"]),
    ("args: {1: 2}", ["args: found {1: 2}", "from argument names"]),
    ("args: {x: !!set {a}}", ["args.x: found", "a set", "plain YAML data"]),
    ("args:\n  m:\n    - x: !!binary YQ==", ["exp.yaml:4: args.m.0.x: found", "a bytes", "plain YAML data"]),
    ("args: &a\n  x: *a", ["args: found a value that contains itself"]),
    ("args: {x: 1, x: 2}", ["exp.yaml:2: args.x: found a second time (first in line 2)", "allowed: once"]),
    ("args: [{x: 1, x: 2}]", ["args.0.x: found a second time"]),
    ("function: other.py:f", ["exp.yaml:2: function: found a second time (first in line 1)"]),
    ("args: {x: 1", ["exp.yaml: not valid YAML (line 3, column 1)", "expected ',' or '}'"]),
    ("\tseed: 1", ["exp.yaml: not valid YAML (line 2, column 1)", "cannot start any token"]),
    ("args: {x: *nobody}", ["not valid YAML (line 2, column 11)", "undefined alias 'nobody'"]),
    ("args: {x: !!python/name:os.system }", ["not valid YAML (line 2, column 11)", "constructor"]),
    ("args: {x: !!int many}", ["exp.yaml: not valid YAML", "many"]),
    ("args: {x: !!bool many}", ["exp.yaml: not valid YAML", "many"]),
    ("? [a, b]\n: 1", ["not valid YAML (line 2, column 3)", "unhashable"]),
    ("---\nseed: 1", ["not valid YAML (line 2, column 1)", "another document"]),
    ("seed: \x07", ["exp.yaml:2: found a character that YAML does not allow"]),
    ("args: {x: " + "[" * 5000, ["exp.yaml: nested too deeply"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[text[:40] for text, _ in WRONG])
def test_a_mistake_in_the_file_is_one_clear_error(text: str, words: list[str]) -> None:
    """The error names file and line, the dotted key, what was found, what is allowed and the nearest key."""
    error = message(load, write(f"{SMALL}{text}\n"))
    assert error.startswith("exp.yaml")
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("", ["exp.yaml: function: missing", "path.py:function or package.module:function"]),
        ("function: digits.py", ["exp.yaml:1: function: found digits.py", "path.py:function"]),
        ("function: ':train'", ["function: found :train"]),
        ("function: a b:train", ["function: found a b:train"]),
        ("function: a.py:2x", ["function: found a.py:2x"]),
        ("function: 3", ["function: found 3, which is text only in quotes"]),
    ],
)
def test_a_function_that_names_nothing_is_refused(function: str, words: list[str]) -> None:
    """`function` is required, and must have one of its two forms."""
    error = message(load, write(f"seed: 1\n{function}\n" if not function else f"{function}\n"))
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("option", "instead"),
    [
        ("signal", "slurm.lead"),
        ("--signal", "slurm.lead"),
        ("requeue", "chain.handoff"),
        ("no_requeue", "chain.handoff"),
        ("dependency", "chain.handoff"),
        ("output", "dir"),
        ("error", "dir"),
        ("open_mode", "dir"),
        ("time", "slurm.time"),
        ("nodes", "slurm.nodes"),
        ("ntasks", "slurm.tasks_per_node"),
        ("ntasks-per-node", "slurm.tasks_per_node"),
        ("gpus_per_node", "slurm.gpus_per_node"),
        ("cpus-per-task", "slurm.cpus_per_task"),
        ("partition", "slurm.partition"),
        ("job-name", "name"),
        ("array", "one submission per run"),
        ("wrap", "function"),
        ("parsable", "chainrun's own commands"),
    ],
)
def test_an_sbatch_option_that_chainrun_sets_is_refused_with_the_key_to_use(
    option: str, instead: str
) -> None:
    """Two owners of one option would break the chain, so the error names the one that decides."""
    error = message(load, write(f"{SMALL}slurm: {{extra: {{{option}: 1}}}}\n"))
    assert error.startswith(f"exp.yaml:2: slurm.extra.{option}: found --")
    assert f"which chainrun sets itself; use {instead}" in error or f"and {instead}" in error


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["exp.yaml: function: missing; allowed: path.py:function"]),
        (b"# all comments\n", ["exp.yaml: function: missing"]),
        (b"- a\n- b\n", ["exp.yaml: found [a, b]", "allowed: {name: ..., function: ..."]),
        (b"train\n", ["exp.yaml: found train", "allowed: {name: ..., function: ..."]),
        (b"name: \xff\xfe\n", ["exp.yaml: found bytes that are not UTF-8 text, at 6"]),
        ("function: a:b".encode("utf-16"), ["exp.yaml: found bytes that are not UTF-8 text, at 0"]),
    ],
)
def test_a_file_that_is_no_mapping_is_one_clear_error(content: bytes, words: list[str]) -> None:
    """Empty, a list, bare text and other encodings are named as such."""
    Path("exp.yaml").write_bytes(content)
    error = message(load, "exp.yaml")
    for word in words:
        assert word in error


def test_a_file_that_cannot_be_read_is_one_clear_error(folder: Path) -> None:
    """A missing file suggests the nearest one; a directory, and a file as a directory, are named."""
    write(SMALL, "digits.yaml")
    missing = "cannot be read: No such file or directory"
    assert message(load, "digit.yaml") == f"digit.yaml: {missing} (did you mean 'digits.yaml'?)"
    assert message(load, "nowhere/digits.yaml") == f"nowhere/digits.yaml: {missing}"
    assert message(load, folder) == f"{folder}: cannot be read: Is a directory"
    assert "cannot be read: Not a directory" in message(load, "digits.yaml/x.yaml")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm() -> None:
    """Files from other editors are read as they look."""
    Path("exp.yaml").write_bytes(b"\xef\xbb\xbffunction: a:b\r\nseed: 3\r\n")
    assert load("exp.yaml").seed == 3


# ---- overrides -------------------------------------------------------------------------------------------


def test_overrides_change_and_add_values_in_order() -> None:
    """A value is YAML with the same floats; missing mappings on the way are made; the last one wins."""
    changed = load(
        write(FULL),
        [
            "args.lr=1e-1",
            "args.model.depth=3",
            "slurm.time=1h",
            "slurm.time = 2h",
            "slurm.extra.constraint=a100",
            "checkpoint.every={steps: 10}",
            "checkpoint.keep_every.steps=100",
            "slurm.partition=",
            "name=digits-lr=0.1",
        ],
    )
    assert changed.args == {"lr": 0.1, "epochs": 20, "model": {"depth": 3}}
    assert changed.slurm.time == 7200
    assert changed.slurm.extra == {"constraint": "a100"}
    assert changed.checkpoint == Checkpoint(Steps(10), 2, Steps(100))
    assert changed.slurm.partition is None
    assert changed.name == "digits-lr=0.1"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("args.lr", ["override args.lr: found no key=value", "args.lr=0.1"]),
        ("=3", ["override =3: found no key=value"]),
        ("args..lr=3", ["found no key=value"]),
        ("slurm.tiem=2h", ["override slurm.tiem=2h: slurm.tiem: unknown key (did you mean 'time'?)"]),
        ("slrum.time=2h", ["override slrum.time=2h: slrum: unknown key (did you mean 'slurm'?)"]),
        ("slurm.time.x=3", ["slurm.time: found 4h, which has no keys below it", "allowed: slurm.time=VALUE"]),
        ("args.lr.x.y=3", ["args.lr: found 0.01, which has no keys below it"]),
        ("slurm.time=90", ["override slurm.time=90: slurm.time: found 90", "write 90s"]),
        ("slurm=4", ["override slurm=4: slurm: found 4", "{time: ..."]),
        ("slurm.lead=5h", ["override slurm.lead=5h: slurm.lead: found 5h, with slurm.time 4h"]),
        ("args.x=[1", ["override args.x=[1: not valid YAML (line 1, column 3)"]),
        ("args.x={a: 1, a: 2}", ["override args.x={a: 1, a: 2}:1: a: found a second time"]),
        ("function=", ["override function=: function: found null"]),
    ],
)
def test_a_mistake_in_an_override_is_one_clear_error(override: str, words: list[str]) -> None:
    """The error names the override instead of a line of the file."""
    error = message(load, write(FULL), [override])
    assert error.startswith("override ")
    for word in words:
        assert word in error


def test_a_mistake_in_the_file_is_still_named_there_when_overrides_are_given() -> None:
    """An override of one key does not take the blame for another."""
    path = write(f"{SMALL}slurm:\n  time: 90\n")
    assert message(load, path, ["slurm.nodes=2"]).startswith("exp.yaml:3: slurm.time: found 90")


# ---- from Python -----------------------------------------------------------------------------------------


def test_a_dict_from_python_is_checked_like_a_file_and_left_alone(folder: Path) -> None:
    """The same rules without file and line; neither overrides nor the run change the caller's dict."""
    data = {
        "name": "x",
        "function": "a:b",
        "args": {"l": [1]},
        "dir": folder / "r",
        "slurm": {"setup": ("a",)},
    }
    made = from_dict(data, folder, ["args.lr=1e-2", "slurm.time=1h"])
    assert made.args == {"l": [1], "lr": 0.01}
    assert made.slurm.setup == ("a",)
    assert made.dir == folder / "r"
    assert data["args"] == {"l": [1]}
    assert data["slurm"] == {"setup": ("a",)}
    assert made.args["l"] is not data["args"]["l"]  # type: ignore[index]
    assert message(from_dict, {"function": "a:b"}, folder).startswith("name: missing")
    assert message(from_dict, {**data, "slurm": {"tiem": 1}}, folder).startswith("slurm.tiem: unknown key")
    assert message(from_dict, [], folder).startswith("experiment: found []")


class Subclass(float):
    """Looks like a float, and would not come back as one."""


@pytest.mark.parametrize("value", [(1, 2), {1}, b"x", object(), Subclass(1), timedelta(1), {"a": {(1,): 2}}])
def test_arguments_that_yaml_cannot_hold_are_refused(value: Any, folder: Path) -> None:
    """What would not come back equal from the frozen file is an error before anything is submitted."""
    error = message(from_dict, {"name": "x", "function": "a:b", "args": {"k": [value]}}, folder)
    assert error.startswith("args.k.0")
    assert "plain YAML data (str, int, float" in error


def test_arguments_that_contain_themselves_are_refused(folder: Path) -> None:
    """A cycle cannot be frozen."""
    loop: list[Any] = []
    loop.append(loop)
    assert "contains itself" in message(
        from_dict, {"name": "x", "function": "a:b", "args": {"l": loop}}, folder
    )


# ---- the frozen form and differences ---------------------------------------------------------------------

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.from_regex(r"[-+]?[0-9_.]*([eE][-+]?[0-9]+)?|[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?|<<|=|~|no|\*x|0[0-7]+", fullmatch=True)
)  # fmt: skip
plain = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=8,
)
seconds = st.integers(1, 10**9).map(lambda milliseconds: format_duration(milliseconds / 1000))
minutes = st.integers(60, 10**7).map(format_duration)
steps = st.fixed_dictionaries({"steps": st.integers(1)})


def section(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


experiments = st.fixed_dictionaries(
    {"name": st.from_regex(r"\w[\w.+=@,-]{0,40}", fullmatch=True), "function": st.sampled_from(["a:b", "a/b.py:c"])},
    optional={
        "args": st.dictionaries(st.text(), plain, max_size=4),
        "seed": st.none() | st.integers(0, 2**32 - 1),
        "dir": st.sampled_from(["runs", "a b/ü", "/x/../y", "%", "~"]),
        "deterministic": st.booleans(),
        "checkpoint": section(every=st.none() | seconds | steps, keep=st.integers(1), keep_every=st.none() | steps),
        "chain": section(handoff=st.sampled_from(["requeue", "ahead"]), max_segments=st.integers(1),
                         max_node_hours=st.none() | st.integers(1, 10**6) | st.floats(1e-3, 1e6), retry_errors=st.integers(0)),
        "slurm": section(time=st.none() | minutes, nodes=st.integers(1), setup=st.lists(st.text()),
                         partition=st.none() | st.sampled_from(["gpu", "1e5", "no"]),
                         extra=st.fixed_dictionaries({}, optional={"mem": st.sampled_from(["1e5", "4G", 3]), "exclusive": st.booleans()})),
        "local": section(walltime=seconds, tasks=st.integers(1)) | section(lead=seconds),
    },
)  # fmt: skip


@settings(deadline=None)  # the first example pays for what later ones find in caches
@given(experiments)
def test_the_frozen_form_reads_back_as_the_same_experiment(data: dict[str, Any]) -> None:
    """load(to_yaml(e)) == e, whatever the arguments look like, and nothing differs by type either."""
    made = from_dict(data, Path("base"))
    frozen = to_yaml(made)
    path = Path("experiment.yaml")
    path.write_bytes(frozen.encode("utf-8", "strict"))
    again = load(path)
    assert again == made
    assert diff(made, again) == []
    assert to_yaml(again) == frozen


def test_the_frozen_form_means_the_same_from_any_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are absolute, the keys are in the order of the documentation, and every key is there."""
    write("", "digits.py")
    made = load(write(FULL))
    frozen = write(to_yaml(made), "runs/digits/experiment.yaml").absolute()
    monkeypatch.chdir("/")
    assert load(frozen) == made
    lines = frozen.read_text().splitlines()
    assert lines[:2] == ["name: digits", f"function: {folder}/digits.py:train"]
    assert f"dir: {folder}/runs" in lines
    assert "  time: 4h" in lines
    assert "  keep_every: null" in lines


def test_differences_are_lines_that_a_person_reads() -> None:
    """Changed, added and removed keys, durations as durations, and types that only look the same."""
    path = write(FULL)
    old = load(path)
    assert diff(old, old) == []
    assert diff(old, load(path, ["args.lr=0.1", "slurm.time=1-12:00:00", "chain.handoff=ahead"])) == [
        "args.lr: 0.01 -> 0.1",
        "chain.handoff: auto -> ahead",
        "slurm.time: 4h -> 1d 12h",
    ]
    assert diff(old, load(path, ["args={lr: 0.01}"])) == ["args.epochs: 20 -> not set"]
    assert diff(old, load(path, ["args.m.x=1"])) == ["args.m: not set -> {x: 1}"]
    assert diff(old, load(path, ["args.m={}"])) == ["args.m: not set -> {}"]
    assert diff(load(path, ["args="]), load(path, ["args={a: 1}"])) == ["args.a: not set -> 1"]
    assert diff(old, load(path, ["args.epochs='20'"])) == ["args.epochs: 20 -> '20'"]
    assert diff(old, load(path, ["args.epochs=20.0"])) == ["args.epochs: 20 -> 20.0"]
    assert diff(load(path, ["args.x=1"]), load(path, ["args.x=true"])) == ["args.x: 1 -> true"]
    assert diff(load(path, ["args.x=.nan"]), load(path, ["args.x=.nan"])) == []
    assert diff(load(path, ["args={a.b: 1}"]), load(path, ["args={a: {b: 1}}"])) != []
    assert diff(load(path), load(path, ['args.x="a\\nb"'])) == ['args.x: not set -> "a\\nb"']


# ---- the user's function ---------------------------------------------------------------------------------


def test_a_function_is_looked_up_beside_the_experiment_then_here(folder: Path) -> None:
    """The first file of the two counts, and the path in the source is absolute."""
    write("def train(run): ...\n", "project/digits.py")
    write("def train(run): ...\n", "digits.py")
    write("def train(run): ...\n", "here.py")
    assert find_function("digits.py:train", Path("project")) == FunctionSource(
        folder / "project" / "digits.py", None, "train"
    )
    assert find_function("here.py:train", Path("project")).path == folder / "here.py"
    made = load(write(SMALL, "project/exp.yaml"))
    assert find_function(made, Path("/")).path == folder / "project" / "digits.py"


@pytest.mark.parametrize(
    "body",
    [
        "def train(run): ...",
        "async def train(run): ...",
        "class train: ...",
        "train = print",
        "train: object = print",
        "a, (train, b) = 1, (print, 2)",
        "from os import path as train",
        "import train",
        "from os.path import *",
        "if True:\n    def train(run): ...",
        "try:\n    train = 1\nexcept ValueError:\n    pass",
        "import torch_is_not_imported_here\ndef train(run): ...\nx = '\\d'",
    ],
)
def test_a_name_at_the_top_level_is_found_without_importing(body: str) -> None:
    """Any way to bind a name counts; the file itself is not run."""
    write(f"{body}\nraise SystemExit('this file was run')\n", "digits.py")
    find_function("digits.py:train", Path())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "def train_one(run): ...\nclass Net: ...",
            ["no train at the top", "mean 'train_one'?", "train_one, Net"],
        ),
        ("def f():\n    def train(run): ...", ["found no train at the top level of", "there: f"]),
        ("class A:\n    def train(self): ...", ["found no train at the top level of", "there: A"]),
        ("x = 1", ["found no train", "no functions or classes"]),
        ("def train(run:\n    pass", ["digits.py:1: syntax error: '(' was never closed"]),
        ("\x00", ["digits.py", "null bytes"]),
    ],
)
def test_a_missing_function_is_an_error_before_anything_is_submitted(body: str, words: list[str]) -> None:
    """The error names the file, the nearest name and what the file defines; a syntax error its line."""
    write(body, "digits.py")
    error = message(find_function, "digits.py:train", Path())
    for word in words:
        assert word in error


def test_a_missing_file_names_both_places_and_the_nearest_file(folder: Path) -> None:
    """The lookup is shown, so that nobody has to guess it."""
    write("", "project/digits.py")
    error = message(find_function, "digts.py:train", Path("project"))
    assert (
        error
        == f"function: no file {folder}/project/digts.py or {folder}/digts.py (did you mean 'digits.py'?)"
    )
    assert "function: found digits.py; allowed: path.py:function" in message(
        find_function, "digits.py", Path()
    )


@pytest.mark.parametrize("name", ["random.py", "torch.py", "train.v2.py"])
def test_a_file_that_no_worker_could_import_is_refused(name: str) -> None:
    """A file that hides a library, or that `import` cannot name, fails at submission."""
    write("def train(run): ...\n", name)
    error = message(find_function, f"{name}:train", Path())
    assert name in error
    assert "rename the file" in error


def test_a_module_is_found_and_checked_without_running_it_or_its_parents(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules on sys.path come first, then those beside the experiment and here; nothing of them runs."""
    write("raise SystemExit('was run')\n", "lib/pkg/__init__.py")
    write("raise SystemExit('was run')\ndef train(run): ...\n", "lib/pkg/inner/digits.py")
    write("def train(run): ...\n", "project/beside/sub/__init__.py")
    monkeypatch.syspath_prepend(str(folder / "lib"))
    assert find_function("pkg.inner.digits:train", Path()) == FunctionSource(
        folder / "lib/pkg/inner/digits.py", "pkg.inner.digits", "train"
    )
    assert (
        find_function("beside.sub:train", Path("project")).path == folder / "project/beside/sub/__init__.py"
    )
    assert find_function("math:sqrt", Path()) == FunctionSource(None, "math", "sqrt")
    assert "found no trian" in message(find_function, "pkg.inner.digits:trian", Path())
    error = message(find_function, "nowhere.digits:train", Path("project"))
    assert error == f"function: no module nowhere.digits on sys.path, in {folder}/project or {folder}"
    assert "no module math.x" in message(find_function, "math.x:train", Path())


def test_a_module_behind_a_broken_package_names_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the parents must be imported to look further, their exception is in the error."""
    write("raise RuntimeError('no GPU')\n", "pkg/__init__.py")
    monkeypatch.syspath_prepend(os.getcwd())
    assert "(RuntimeError: no GPU)" in message(find_function, "pkg.gone:train", Path())


@pytest.mark.parametrize(
    ("body", "args", "words"),
    [
        ("def train(run, lr, *, epochs): ...", "lr epochs lrr", ["args.lrr: unknown argument of train in ", "/digits.py (did you mean 'lr'?); allowed: lr, epochs"]),
        ("def train(run, lr=1): ...", "run", ["args.run: unknown argument of train", "allowed: lr"]),
        ("def train(run): ...", "lr", ["args.lr: unknown argument", "allowed: no arguments"]),
        ("def train(run, *args): ...", "args", ["args.args: unknown argument"]),
        ("def train(run, lr, epochs=3): ...", "epochs", ["args.lr: missing for train in ", "/digits.py; allowed: lr, epochs"]),
        ("def train(run, *, epochs=3, lr): ...", "", ["args.lr: missing for train", "allowed: epochs, lr"]),
        ("def train(run, lr, **more): ...", "lrr", ["args.lr: missing for train"]),
        ("def train(run, lr, /): ...", "lr", ["function: found train in", "with (run, lr, /); allowed: one that can be called as train(run, **args)"]),
        ("def train(): ...", "", ["function: found train in", "with ()"]),
        ("def train(*, run): ...", "run", ["function: found train in", "with (*, run)"]),
        ("if True:\n    def train(run): ...", "lr", ["args.lr: unknown argument"]),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_the_signature_are_refused(body: str, args: str, words: list[str]) -> None:
    """A call that Python would refuse when the job starts is refused at submission, with what it takes."""
    write(body, "digits.py")
    error = message(check_arguments, find_function("digits.py:train", Path()), dict.fromkeys(args.split()))
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("body", "args"),
    [
        ("def train(run, lr, epochs=3, *, seed=0): ...", "lr"),
        ("def train(run, /, lr, *rest, seed): ...", "lr seed"),
        ("def train(run=None, lr=1): ...", ""),
        ("def train(*args, lr): ...", "lr"),
        ("def train(*args, **more): ...", "anything"),
        ("def train(run, lr, **more): ...", "lr anything"),
        ("@print\ndef train(): ...", "lr"),
        ("async def train(): ...", "lr"),
        ("class train: ...", "lr"),
        ("train = print", "lr"),
        ("from os import remove as train", "lr"),
        ("from os.path import *", "lr"),
        ("def train(): ...\ntrain = print", "lr"),
        ("try:\n    def train(run, lr): ...\nfinally:\n    def train(run): ...", ""),
    ],
)
def test_arguments_that_fit_and_signatures_that_the_file_does_not_show_pass(body: str, args: str) -> None:
    """What is decorated, imported, a class or bound twice is left to Python, rather than refused wrongly."""
    write(body, "digits.py")
    check_arguments(find_function("digits.py:train", Path()), dict.fromkeys(args.split()))


def test_arguments_of_a_module_are_checked_where_it_has_a_file() -> None:
    """`package.module:function` is checked in the same way; what is compiled shows no signature."""
    write("def train(run): ...\n", "pkg_args/digits.py")
    source = find_function("pkg_args.digits:train", Path())
    assert "args.lr: unknown argument" in message(check_arguments, source, {"lr": 1})
    check_arguments(find_function("math:sqrt", Path()), {"lr": 1})


def test_a_function_is_loaded_with_its_neighbours(folder: Path) -> None:
    """The folder of the file is first on sys.path, once, and the module keeps its identity."""
    write("value = 3\n", "project/helper_of_digits.py")
    write("import helper_of_digits\ndef train(run): return helper_of_digits.value\n", "project/digits_a.py")
    source = find_function("digits_a.py:train", Path("project"))
    function = load_function(source)
    assert function(None) == 3
    assert load_function(source) is function
    assert sys.modules["digits_a"].train is function
    assert sys.path[0] == str(folder / "project")
    assert sys.path.count(str(folder / "project")) == 1


def test_a_file_of_the_same_name_in_another_folder_is_another_module() -> None:
    """Two experiments in one process do not get each other's function."""
    for folder in ("a", "b"):
        write(f"def train(run): return '{folder}'\n", f"{folder}/digits_b.py")
    loaded = [load_function(find_function("digits_b.py:train", Path(folder))) for folder in ("a", "b")]
    assert [function(None) for function in loaded] == ["a", "b"]


def test_a_file_never_replaces_a_library_that_is_imported_already() -> None:
    """The error names both files instead of breaking the library."""
    write("def train(run): ...\n", "pytest.py")
    error = message(load_function, find_function("pytest.py:train", Path()))
    assert "another module pytest is imported already" in error
    assert sys.modules["pytest"] is pytest


def test_spawned_workers_can_unpickle_what_the_file_defines() -> None:
    """Loader workers under spawn import the file again by its stem."""
    write(
        "class Work:\n    def __call__(self, x): return x + 1\ndef train(run): return Work()\n", "digits_c.py"
    )
    work = load_function(find_function("digits_c.py:train", Path()))(None)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(work, [1]) == [2]


def test_a_module_beside_the_experiment_is_loaded() -> None:
    """What `find_function` has found there, `load_function` can import, relative imports included."""
    write("from .part import value\ndef train(run): return value\n", "project/pkg_beside/digits.py")
    write("value = 4\n", "project/pkg_beside/part.py")
    assert load_function(find_function("pkg_beside.digits:train", Path("project")))(None) == 4
    assert load_function(find_function("math:sqrt", Path()))(4) == 2


@pytest.mark.parametrize(
    ("body", "words", "cause"),
    [
        ("import os\nimport no_such_thing\n", [".py:2: cannot be imported: ModuleNotFoundError: No module"], ImportError),
        ("def f():\n    1 / 0\n\nf()\n", [".py:2: cannot be imported: ZeroDivisionError"], ZeroDivisionError),
        ("raise SystemExit(3)\n", [".py:1: cannot be imported: SystemExit: 3"], SystemExit),
        ("import broken_helper\n", ["broken_helper.py:2: syntax error"], SyntaxError),
        ("def g(): ...\n", ["function: train in", "not defined when imported"], None),
        ("train = 3\n", ["function: train in", "found 3", "allowed: a function"], None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["digits_d.py", "digits_d"])
def test_a_failure_inside_the_import_names_file_line_and_cause(
    form: str, body: str, words: list[str], cause: type[BaseException] | None
) -> None:
    """The original exception is chained, and the half-imported module is gone."""
    path = write(body, "digits_d.py").absolute()
    write("x = 1\nx = = 2\n", "broken_helper.py")
    source = FunctionSource(path, None if form.endswith(".py") else form, "train")
    with pytest.raises(ExperimentError) as caught:
        load_function(source)
    for word in words:
        assert word in str(caught.value)
    assert cause is None or isinstance(caught.value.__cause__, cause)
    assert cause is None or "digits_d" not in sys.modules


def test_looking_at_an_experiment_imports_nothing_heavy() -> None:
    """`status` and `submit` answer at once: no torch, numpy or submitit, and no other part of chainrun."""
    write("import torch\ndef train(run): ...\n", "digits.py")
    write(FULL)
    code = """
        import sys
        from chainrun.experiment import load
        from chainrun.function import find_function
        find_function(load("exp.yaml"), ".")
        print(*sorted(m for m in sys.modules if m.split(".")[0] in ("torch", "numpy", "submitit", "chainrun")))
        """
    root = str(Path(experiment.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == {
        "chainrun",
        "chainrun.durations",
        "chainrun.errors",
        "chainrun.experiment",
        "chainrun.function",
        "chainrun.yamlfile",
    }
