"""`chainrun show CHECKPOINT` and `chainrun export`: what they say is what torch finds in the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sharded import created, segments

import chainrun
from chainrun import cli
from chainrun.checkpoint import inside
from chainrun.errors import CheckpointError, UsageError


class Tied(torch.nn.Module):
    """Two layers with one weight, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("columns", torch.arange(12.0).reshape(3, 4).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))

    def get_extra_state(self) -> Any:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def checkpoint(folder: Path, **others: Any) -> tuple[Path, Tied]:
    """Train a step, and return the checkpoint after it with the model as it was then."""
    run = chainrun.Run(folder)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    loader = chainrun.DataLoader(list(range(4)))
    draws = torch.Generator()
    run.register(model=model, optimizer=optimizer, loader=loader, draws=draws, **others)
    run.state["best"] = 0.5
    for _ in loader:
        model(torch.ones(6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()
        break
    run._finish(None)
    run._close()
    return max((folder / "checkpoints").iterdir()), model


def command(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 0) -> str:
    assert cli.main([str(word) for word in words]) == code
    said = capsys.readouterr()
    return said.err if code else said.out


def of_torch(tree: Any, name: str) -> list[tuple[str, str, list[int], int]]:
    """Name, dtype, shape and bytes of the tensors in a tree that torch has loaded."""
    if isinstance(tree, torch.Tensor):
        dtype = str(tree.dtype).removeprefix("torch.")
        return [(name, dtype, list(tree.shape), tree.numel() * tree.element_size())]
    if not isinstance(tree, (dict, list, tuple)):
        return []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [found for key, value in items for found in of_torch(value, f"{name}.{key}")]


# ---- show


def test_every_tensor_is_listed_as_torch_loads_it(tmp_path, capsys):
    """Names, dtypes, shapes and bytes of all objects and loaders, in order; tied ones name each other."""
    path, _ = checkpoint(tmp_path)
    shown = json.loads(command(capsys, "show", path, "--json"))
    assert shown["flaw"] is None and not shown["verified"]
    assert shown["manifest"]["step"] == 1
    loaded = torch.load(path / "rank-00000.pt", weights_only=True)
    expected = [e for kind in ("objects", "loaders") for k, v in loaded[kind].items() for e in of_torch(v, k)]
    held = shown["held"]
    assert [(t["name"], t["dtype"], t["shape"], t["bytes"]) for t in held["tensors"]] == expected
    assert {t["name"]: t["shares"] for t in held["tensors"] if t["shares"]} == {
        "model.last.weight": "model.first.weight"
    }
    assert held["random"] == ["python", "numpy", "torch", "draws"]
    assert held["state"] == ["best"]


def test_the_space_of_the_parts_is_that_of_the_file(tmp_path, capsys):
    """Storages are counted once, so that the parts make up all tensor bytes of the file."""
    path, _ = checkpoint(tmp_path)
    held = json.loads(command(capsys, "show", path, "--json"))["held"]
    parts = {part["name"]: part["bytes"] for part in held["parts"]}
    assert parts["model"] == 4 * (36 + 6 + 12)  # the tied weight once
    assert parts["optimizer"] == 2 * 4 * (36 + 6) + 2 * 4  # two moments each, and their steps
    storages = {}
    pending: list[Any] = [torch.load(path / "rank-00000.pt", weights_only=True)]
    for tree in pending:
        if isinstance(tree, torch.Tensor):
            storages[tree.untyped_storage().data_ptr()] = tree.untyped_storage().nbytes()
        elif isinstance(tree, (dict, list, tuple)):
            pending += tree.values() if isinstance(tree, dict) else tree
    assert sum(parts.values()) == sum(storages.values())


def test_the_largest_tensors_come_first_and_all_in_their_order(tmp_path, capsys):
    """Without --all there are ten, by size; with it all of them as they are registered."""
    path, _ = checkpoint(tmp_path, wide=torch.nn.ModuleList(torch.nn.Linear(1, n) for n in range(1, 13)))
    few = command(capsys, "show", path).partition("the largest 10 of ")[2].splitlines()[1:]
    assert len(few) == 10
    assert few[0].split() == ["draws.generator", "5.06", "kB", "uint8", "5056"]
    everything = command(capsys, "show", path, "--all").partition("\ntensors\n")[2].splitlines()
    assert everything[0].split() == ["model.columns", "48", "B", "float32", "4x3"]
    assert everything[1].split() == ["model.first.weight", "144", "B", "float32", "6x6"]
    assert "in the memory of model.first.weight" in "\n".join(everything)
    assert len(everything) > 30


def test_only_verify_reads_the_content(tmp_path, capsys):
    """A flipped byte of a weight is found by --verify, with exit code 1; a missing one always."""
    path, _ = checkpoint(tmp_path)
    file = path / "rank-00000.pt"
    whole = file.read_bytes()
    assert "verified     sizes only" in command(capsys, "show", path)
    assert "verified     yes" in command(capsys, "show", path, "--verify")
    assert json.loads(command(capsys, "show", path, "--verify", "--json"))["verified"]
    for data, words in {whole[:-1]: (), whole[:-99] + b"!" + whole[-98:]: ("--verify",)}.items():
        file.write_bytes(data)
        assert cli.main(["show", str(path), *words]) == 1
        assert "verified     no: " in capsys.readouterr().out
        assert cli.main(["show", str(path), "--json", *words]) == 1
        assert "rank-00000.pt" in json.loads(capsys.readouterr().out)["flaw"]


def test_options_of_checkpoints_are_refused_for_runs_and_unknown_ranks_named(tmp_path, capsys):
    """Exit code 2, and what to give instead."""
    path, _ = checkpoint(tmp_path)
    (tmp_path / "experiment.yaml").touch()
    assert "--all is for a checkpoint" in command(capsys, "show", tmp_path, "--all", code=2)
    assert "has 1 ranks, there is no rank 1" in command(capsys, "show", path, "--rank", "1", code=2)


def test_a_runs_story_as_json(tmp_path, capsys):
    """Its state, its events and its checkpoints, newest first."""
    path, _ = checkpoint(tmp_path)
    (tmp_path / "experiment.yaml").touch()
    story = json.loads(command(capsys, "show", tmp_path, "--json"))
    assert [event["event"] for event in story["events"]] == ["checkpoint"]
    assert story["checkpoints"][0] == {
        "path": str(path),
        "step": 1,
        "size": (path / "rank-00000.pt").stat().st_size,
    }


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR:UserWarning", "ignore:torch.ao.quantization:DeprecationWarning"
)
def test_all_kinds_of_values_are_read_without_torch(tmp_path):
    """Whatever a checkpoint may hold, in a process in which torch cannot be imported."""
    views = torch.zeros(10)
    marked = torch.ones(3)
    marked.note = torch.ones(2)
    tree = {
        "view": views[2:5],
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        **{
            str(dtype): torch.ones(3).to(dtype)
            for dtype in (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.uint16, torch.uint64)
        },
        **{str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.bool, torch.int8, torch.complex64)},
        "sparse": torch.eye(4).to_sparse(),
        "csr": torch.eye(4).to_sparse_csr(),
        "meta": torch.empty(7, 2, device="meta", dtype=torch.float16),
        "scalar": torch.tensor(1.0),
        "marked": marked,
        "module": torch.nn.Linear(2, 2).state_dict(),
        "plain": [OrderedDict(a=1), Counter("ab"), {1, 2}, 1 + 2j, b"bytes", torch.Size([1]), torch.float32],
        "device": torch.device("cpu"),
    }
    torch.save(tree, tmp_path / "file.pt")
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        "from pathlib import Path; from chainrun.checkpoint import inside\n"
        "tree = inside.read(Path(sys.argv[1]))\n"
        "print(json.dumps([(n, t.dtype, list(t.shape), t.nbytes) for n, t in inside.tensors(tree)]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {name: tuple(rest) for name, *rest in json.loads(done.stdout)}
    sparse = {"sparse": 2 * 4 * 8 + 4 * 4, "csr": 5 * 8 + 4 * 8 + 4 * 4}  # indices in int64, and values
    assert found == {
        name.removeprefix("."): (dtype, shape, sparse.get(name[1:], size))
        for name, dtype, shape, size in of_torch({k: v for k, v in tree.items() if k not in sparse}, "")
        + [(f".{name}", "float32", [4, 4], size) for name, size in sparse.items()]
    }


def test_a_pickle_that_would_run_code_runs_none(tmp_path):
    """What it asks to call is not even imported."""

    class Evil:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"evil": Evil()}, tmp_path / "file.pt")
    inside.read(tmp_path / "file.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "file.pt").write_bytes(b"no zip")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        inside.read(tmp_path / "file.pt")


# ---- export


@pytest.fixture
def load_file() -> Any:
    return pytest.importorskip("safetensors.torch").load_file


def test_an_exported_module_has_all_its_tensors(tmp_path, capsys, load_file):
    """Bit for bit, tied and transposed ones too, under its own names; what is no tensor is named."""
    path, model = checkpoint(tmp_path / "run")
    file = tmp_path / "model.safetensors"
    said = command(capsys, "export", path, "-o", file)
    assert "left out, no tensors: _extra_state.version" in said
    exported = load_file(file)
    expected = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    assert [one.name for one in tmp_path.iterdir() if "safetensors" in one.name] == [file.name]
    with pytest.importorskip("safetensors").safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "run": "run", "step": "1", "object": "model"}


def test_other_objects_are_exported_by_name(tmp_path, capsys, load_file):
    """An optimizer's moments by their keys; a name that is not there, and no name among two modules, are refused."""
    path, _ = checkpoint(tmp_path / "run", average=torch.nn.Linear(2, 2))
    file = tmp_path / "moments.safetensors"
    assert chainrun.Checkpoint(path).export(file, object="optimizer")[0] == "param_groups.0.lr"
    saved = chainrun.Checkpoint(path).load()["optimizer"]["state"]
    exported = load_file(file)
    assert torch.equal(exported["state.0.exp_avg"], saved[0]["exp_avg"])
    assert len(exported) == 3 * len(saved)
    said = command(capsys, "export", path, "-o", file, "--object", "modle", code=2)
    assert "no object 'modle' (did you mean 'model'?); it holds model, optimizer, draws, average" in said
    said = command(capsys, "export", path, "-o", file, code=2)
    assert "the checkpoint holds 2 modules; say which object to export with --object" in said


def test_what_cannot_be_exported_is_refused_and_leaves_the_old_file(tmp_path, capsys, load_file):
    """Sparse tensors, a state without any tensor, a folder that does not exist, a damaged checkpoint."""

    class Holder:
        def __init__(self, state: Any) -> None:
            self.state = state

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    others = {
        "sparse": {"grid": torch.eye(3).to_sparse()},
        "count": {"n": 1},
        "twice": {"a.b": torch.ones(1)},
    }
    others["twice"]["a"] = {"b": torch.zeros(1)}
    path, _ = checkpoint(tmp_path / "run", **{name: Holder(state) for name, state in others.items()})
    file = tmp_path / "file.safetensors"
    file.write_text("old")
    for name, text in {
        "sparse": "'sparse': grid is torch.sparse_coo",
        "count": "'count' holds no tensor",
        "twice": "two tensors whose keys, joined by dots, are a.b",
    }.items():
        assert text in command(capsys, "export", path, "-o", file, "--object", name, code=2)
    nowhere = tmp_path / "nowhere" / "file.safetensors"
    said = command(capsys, "export", path, "-o", nowhere, "--object", "model", code=1)
    assert f"{nowhere} could not be written: its folder does not exist" in said
    whole = (path / "rank-00000.pt").read_bytes()
    (path / "rank-00000.pt").write_bytes(whole[:-99] + b"!" + whole[-98:])
    said = command(capsys, "export", path, "-o", file, "--object", "model", code=1)
    assert "has changed since it was written" in said
    assert file.read_text() == "old"


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    """An error of use, that names the extra."""
    path, _ = checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match=r"pip install 'chainrun\[export\]'"):
        chainrun.Checkpoint(path).export(tmp_path / "file.safetensors")


def test_sharded_tensors_are_shown_and_exported_whole(tmp_path, capsys, load_file):
    """Of two ranks' DTensors the whole shapes, with the mesh; the exported ones are those that load() gives."""
    run = created(tmp_path, "shards")
    segments(run, "2:3")
    path = max(run.checkpoints.iterdir())
    whole = chainrun.Checkpoint(path).load()
    held = json.loads(command(capsys, "show", path, "--rank", "1", "--json"))["held"]
    shown = {t["name"]: t for t in held["tensors"]}
    tensors = whole["shards"]
    assert all(shown[f"shards.{key}"]["shape"] == list(value.shape) for key, value in tensors.items())
    assert any(one["mesh"] == [2] for one in held["tensors"])
    assert "sharded over a mesh of (2,)" in command(capsys, "show", path, "--all")
    chainrun.Checkpoint(path).export(tmp_path / "file.safetensors", object="shards")
    exported = load_file(tmp_path / "file.safetensors")
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[key], tensors[key]) for key in tensors)
