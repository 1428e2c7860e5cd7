"""What is on the disk: committed or not there, verified before it is trusted, retired in the right order."""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.tensor  # as trainings with DTensors do: states are looked through for them
from hypothesis import given, settings
from hypothesis import strategies as st

from chainrun import journal
from chainrun.checkpoint import image, state, writer
from chainrun.checkpoint.public import Checkpoint
from chainrun.checkpoint.store import FORMAT, MANIFEST, Store, flaw, rank_file, read_committed, seal
from chainrun.errors import CheckpointError, RegisterError, RestoreError
from chainrun.rundir import RunDir, append_lines, read_lines
from chainrun.training.run import Run
from chainrun.training.saving import Setting

FAULTS = Path(__file__).parent / "faults"


class Trained:
    """What `train` leaves for a test to look at."""

    def __init__(self, run: Run, model: torch.nn.Module, said: list[str]) -> None:
        self.run, self.model, self.said = run, model, said


def train(folder: Path, steps: int, *, keep: int = 2, every: int = 3, size: int = 3, during=None) -> Trained:
    """Train by hand up to a global step, saving every few; resumes what is in the folder.

    Args:
        during: called with the run in every step.
    """
    said: list[str] = []
    run = Run(folder, setting=Setting(save_every_steps=every, keep=keep, say=said.append))
    model = torch.nn.Linear(size, 2)
    run.register(model=model)
    try:
        for index in run.steps(steps):
            with torch.no_grad():
                model.weight.fill_(index + 1)
            if during is not None:
                during(run)
    finally:
        run._close()
    return Trained(run, model, said)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files of a checkpoint."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip(path: Path, at: int, mask: int = 1) -> None:
    """Change bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


# ---- what does not exist, and what cannot be trusted


def test_what_was_not_committed_does_not_exist(tmp_path):
    """Directories without a manifest, unfinished saves and foreign names are passed over without a word."""
    train(tmp_path, 7)
    newest = tmp_path / "checkpoints" / "step-00000006"
    for name in ("step-00000009", "step-00000012.tmp", "step-00000015.flawed-1", "step-15", "notes"):
        shutil.copytree(newest, tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "step-00000009" / MANIFEST).unlink()
    found = Store(RunDir(tmp_path)).newest(lambda checkpoint, why: pytest.fail(f"{checkpoint}: {why}"))
    assert found is not None
    assert found.path == newest
    with pytest.raises(
        CheckpointError, match=r"step-00000009 cannot be used: it holds no manifest.json: it was never"
    ):
        read_committed(tmp_path / "checkpoints" / "step-00000009")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read_committed(tmp_path / "checkpoints" / "step-00000018")
    again = train(tmp_path, 10)
    assert again.run.restored_from.path == newest
    assert again.said == []
    assert "step-00000012.tmp" not in names(tmp_path)
    assert Store(RunDir(tmp_path)).newest().path.name == "step-00000009.1"


def truncate(path: Path) -> None:
    file = path / rank_file(0)
    os.truncate(file, file.stat().st_size - 1)


def lose(path: Path) -> None:
    (path / rank_file(0)).unlink()


def flip_weights(path: Path) -> None:
    file = path / rank_file(0)
    flip(file, file.read_bytes().index(np.float32(6).tobytes()))
    torch.load(file, weights_only=True)  # torch itself does not notice


def from_the_future(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_bytes(seal({**manifest, "format": FORMAT + 1}))


def from_the_past(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_bytes(seal({**manifest, "format": FORMAT - 1}))


def tear_manifest(path: Path) -> None:
    os.truncate(path / MANIFEST, 40)


def flip_manifest(path: Path) -> None:
    at = (path / MANIFEST).read_bytes().index(b'"step": 6') + 8
    flip(path / MANIFEST, at)


DAMAGES = {
    truncate: r"rank-00000.pt has \d+ bytes instead of \d+",
    lose: r"rank-00000.pt: No such file or directory",
    flip_weights: r"the content of rank-00000.pt has changed since it was written",
    from_the_future: rf"it has format {FORMAT + 1}, written by a newer chainrun; this one reads format {FORMAT}: go on with .*",
    from_the_past: rf"it has format {FORMAT - 1}, written by an older chainrun; this one reads format {FORMAT}: go on with .*",
    tear_manifest: r"it holds no valid manifest.json",
    flip_manifest: r"the content of manifest.json has changed since it was written",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_gives_way_to_the_next_older_one(tmp_path, damage):
    """It is said once, why; the damaged one is set aside and kept, and its name is free again."""
    train(tmp_path, 7)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]
    damage(tmp_path / "checkpoints" / "step-00000006")
    damaged = contents(tmp_path / "checkpoints" / "step-00000006")

    second = train(tmp_path, 4)
    assert second.run.restored_from.step == 3
    assert second.run.global_step == 4
    assert len(second.said) == 1
    reason = DAMAGES[damage]
    assert re.search(
        rf"step-00000006 cannot be trusted \({reason}\); it is kept as step-00000006\.flawed-\d+, "
        r"going back to step-00000003",
        second.said[0],
    ), second.said
    fallbacks = list(journal.events(RunDir(tmp_path), "fallback"))
    assert [event["path"] for event in fallbacks] == ["step-00000006"]
    aside = next((tmp_path / "checkpoints").glob("step-00000006.flawed-*"))
    assert contents(aside) == damaged

    third = train(tmp_path, 7)
    assert third.said == []
    assert third.run.restored_from.step == 3
    assert names(tmp_path) == ["step-00000003", "step-00000006", aside.name]
    assert third.model.weight[0, 0] == 7
    assert train(tmp_path, 8).run.restored_from.step == 6


def test_with_no_checkpoint_left_to_trust_the_run_says_so_and_does_not_begin_again(tmp_path):
    """Each damaged one is named, and nothing is renamed, cut or lost."""
    train(tmp_path, 7, during=lambda run: run.log(index=run.global_step))
    for path in (tmp_path / "checkpoints").iterdir():
        truncate(path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(
        RestoreError, match=r"can be trusted \(step-00000006: .*; step-00000003: .*begin again"
    ):
        train(tmp_path, 2)
    assert names(tmp_path) == ["step-00000003", "step-00000006"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_with_all_checkpoints_removed_the_run_says_so_and_does_not_begin_again(tmp_path):
    """As a purge of old files may leave it: the metrics stay, and with the checkpoints back it goes on."""
    train(tmp_path, 7, during=lambda run: run.log(index=run.global_step))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    with pytest.raises(
        RestoreError, match=r"holds no checkpoint, but one was committed at step 6 .* does not begin again by"
    ):
        train(tmp_path, 9)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    assert train(tmp_path, 9).run.restored_from.step == 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run with checkpoints at the steps 3 and 6, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    train(folder, 7)
    return folder


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from([rank_file(0), MANIFEST]), at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_no_flipped_bit_is_ever_restored(trained, name, at, bit):
    """Wherever in a checkpoint one bit changes, it is not used, unless it still says the same."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        newest = Path(folder) / "checkpoints" / "step-00000006"
        before = read_committed(newest).manifest
        flip(newest / name, at % (newest / name).stat().st_size, 1 << bit)
        found = Store(RunDir(Path(folder))).newest()
        if found.path == newest:
            assert name == MANIFEST  # white space, or another spelling of the same value
            assert found.manifest == before
        else:
            assert found.step == 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_single_flipped_byte_is_found(tmp_path, ranks):
    """In all files of a checkpoint, headers and padding too; of two ranks, what the second one has of the first's."""
    store, chance = Store(RunDir(tmp_path).create()), random.Random(0)
    weight = torch.arange(100.0)
    trees = [{"objects": {"net": {"weight": weight, "mean": weight + rank}}} for rank in range(ranks)]
    if ranks == 1:
        path = writer.save(store, writer.Alone(), 1, writer.ready(trees[0]), {})[0]
    else:
        path = save_by_two(store, 1, trees)[0]
        assert torch.load(path / rank_file(1), weights_only=True)["replicated"]
    Checkpoint(path).verify()
    said = read_committed(path).manifest
    files = sorted(path.iterdir())
    assert [file.name for file in files] == [MANIFEST, *map(rank_file, range(ranks))]
    unseen = []
    for file in files:
        whole = file.read_bytes()
        with open(file, "r+b", buffering=0) as damaged:
            for at in range(len(whole)):
                os.pwrite(damaged.fileno(), bytes([whole[at] ^ 1 << chance.randrange(8)]), at)
                try:
                    Checkpoint(path).verify()
                    unseen.append((file.name, at))
                    assert read_committed(path).manifest == said
                except CheckpointError:
                    pass
                os.pwrite(damaged.fileno(), whole[at : at + 1], at)
        assert file.read_bytes() == whole
    assert unseen == []
    Checkpoint(path).verify()


# ---- retention


def commit(store: Store, step: int, **about) -> Path:
    """Save a small checkpoint as a run does; return its directory."""
    about = {"environment": {}, **about}
    return writer.save(
        store, writer.Alone(), step, writer.ready({"objects": {}, "state": {"step": step}}), about
    )[0]


def test_retention_keeps_the_newest_and_those_of_every_so_many_steps(tmp_path):
    """keep counts from the newest; a multiple of keep_every stays for ever."""
    store = Store(RunDir(tmp_path).create())
    removed = []
    for step in range(10, 130, 10):
        commit(store, step)
        removed += [checkpoint.step for checkpoint in store.retire(2, 50)]
    assert [checkpoint.step for checkpoint in store.committed()] == [120, 110, 100, 50]
    assert removed == [10, 20, 30, 40, 60, 70, 80, 90]
    assert names(tmp_path) == ["step-00000050", "step-00000100", "step-00000110", "step-00000120"]


@pytest.mark.parametrize("keep", [1, 2])
def test_of_many_saves_at_one_step_the_newest_is_kept_and_restored(tmp_path, keep):
    """A long evaluation saves again and again at the same global step: the last one counts."""

    def evaluate(folder: Path, upto: int) -> Run:
        run = Run(folder, setting=Setting(keep=keep))
        run.register(model=torch.nn.Linear(2, 2))
        for _ in run.epochs(1):
            run.step()
            for index in range(upto):
                run.state["index"] = index
                run.poll()
                run.save()
                assert len(Store(RunDir(folder)).committed()) <= keep
        run._close()
        return run

    evaluate(tmp_path, 7)
    again = Run(tmp_path)
    assert again.state == {"index": 6}
    assert len(names(tmp_path)) == keep


def test_flawed_checkpoints_neither_count_nor_push_out_good_ones(tmp_path):
    """With two to keep, two good ones stay however many damaged ones are newer."""
    store = Store(RunDir(tmp_path).create())
    for step in (1, 2, 3, 4):
        commit(store, step)
    for step, damage in ((3, truncate), (4, lose)):
        damage(tmp_path / "checkpoints" / f"step-{step:08d}")
    commit(store, 5)
    fresh = Store(RunDir(tmp_path))  # has not seen them written
    assert [checkpoint.step for checkpoint in fresh.retire(2, None)] == [1]
    assert [checkpoint.step for checkpoint in fresh.committed() if flaw(checkpoint) is None] == [5, 2]
    flip(tmp_path / "checkpoints" / "step-00000005" / rank_file(0), 200)
    fresh = Store(RunDir(tmp_path))
    assert list(fresh.retire(1, None)) == []
    assert fresh.newest().step == 2


class Disk:
    """A store under test, and what is known of it."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir(folder).create()
        self.store = Store(self.run)
        self.order: list[Path] = []  # as they were committed
        self.bad: set[Path] = set()

    def newest_good(self) -> Path | None:
        return next((p for p in reversed(self.order) if p not in self.bad and p.exists()), None)


@settings(max_examples=60, deadline=None)
@given(
    keep=st.integers(1, 3),
    keep_every=st.sampled_from([None, 2, 3]),
    moves=st.lists(st.sampled_from(["save", "again", "truncate", "tear", "restart", "crash"]), max_size=25),
    data=st.data(),
)
def test_whatever_happens_the_newest_good_checkpoint_is_the_one_that_is_found(
    tmp_path_factory, keep, keep_every, moves, data
):
    """Saves, saves at the same step, damage and restarts in any order never lose it, nor hide a newer one."""
    folder = tmp_path_factory.mktemp("moves")
    disk, step = Disk(folder), 0
    for move in moves:
        present = [path for path in disk.order if path.exists()]
        if move in ("save", "again"):
            step += move == "save"
            path = commit(disk.store, step)
            assert path not in present
            disk.order = [p for p in disk.order if p != path] + [path]
            disk.bad.discard(path)
            good = [p for p in disk.order if p.exists() and p not in disk.bad]
            for removed in disk.store.retire(keep, keep_every):
                assert not removed.path.exists()
            kept = [p for p in disk.order if p.exists() and p not in disk.bad]
            assert kept[-keep:] == good[-keep:]
            every = [p for p in good if keep_every and int(p.name[5:13]) % keep_every == 0]
            assert set(every) <= set(kept)
            assert set(kept) == {*good[-keep:], *every}
        elif move in ("truncate", "tear") and present:
            path = data.draw(st.sampled_from(present))
            if path not in disk.bad:
                (truncate if move == "truncate" else tear_manifest)(path)
                disk.bad.add(path)
        elif move == "crash":
            (disk.run.checkpoints / f"step-{step + 1:08d}.tmp").mkdir(exist_ok=True)
        elif move == "restart":
            disk.store = Store(disk.run)
            disk.store.clean()
            found = disk.store.newest(lambda checkpoint, why: disk.store.set_aside(checkpoint))
            assert (found and found.path) == disk.newest_good()
            step = found.step if found else 0
    found = Store(disk.run).newest()
    assert (found and found.path) == disk.newest_good()
    shutil.rmtree(folder)


# ---- the file of a rank


def test_plain_torch_opens_a_rank_file_and_finds_the_users_state_dict(tmp_path):
    """weights_only, mapped or not, without chainrun: objects, model, and there the module's own state_dict."""
    trained = train(tmp_path, 4)
    file = tmp_path / "checkpoints" / "step-00000003" / rank_file(0)
    for mmap in (False, True):
        saved = torch.load(file, weights_only=True, mmap=mmap)["objects"]["model"]
        assert type(saved) is type(trained.model.state_dict())
        fresh = torch.nn.Linear(3, 2)
        fresh.load_state_dict(saved)
        assert torch.equal(fresh.weight, torch.full((2, 3), 3.0))
        assert torch.equal(fresh.bias, trained.model.bias)
    code = (
        f"import sys, torch; torch.load({str(file)!r}, weights_only=True); print('chainrun' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


class Best:
    """A class of the user's."""


class Marked(torch.Tensor):
    """A tensor class of the user's."""


class Level(int):
    """A number that is more than one."""


def contain_itself() -> list:
    value: list = []
    value.append(value)
    return value


UNSAVABLE = {
    "a NumPy date": (np.datetime64(0, "s"), r"run\.state\.best is a numpy\.datetime64"),
    "a longer number": (np.longdouble(0.5), r"run\.state\.best is a numpy\.longdouble"),
    "a NumPy array of text": (np.array(["a"]), r"run\.state\.best is a numpy\.ndarray"),
    "a function": (lambda: 1, r"run\.state\.best is a builtins\.function"),
    "an object": (Best(), r"run\.state\.best is a .*\.Best"),
    "deep inside": ({"list": [1, (2, Best())]}, r"run\.state\.best\.list\[1\]\[1\] is a .*\.Best"),
    "as a key": ({np.int64(3): 1}, r"run\.state\.best has a key of type int64; use str or int keys"),
    "in a key": ({(1, Best()): 1}, r"a key of run\.state\.best\[1\] is a .*\.Best"),
    "a subclass": (Level(3), r"run\.state\.best is a .*\.Level"),
    "a tensor class": (
        torch.zeros(2).as_subclass(Marked),
        r"run\.state\.best is a tensor of the class .*\.Marked",
    ),
    "a lazy parameter": (
        torch.nn.UninitializedParameter(),
        r"run\.state\.best is a tensor of the class torch.*UninitializedParameter",
    ),
    "empty bytes": (b"", r"run\.state\.best is empty bytes"),
    "a huge number": (1 << 2039, r"run\.state\.best is an int of 2040 bits"),
    "a circle": (contain_itself(), r"the state contains itself, or is nested too deeply"),
}


@pytest.mark.parametrize("what", UNSAVABLE)
def test_what_weights_only_cannot_hold_is_an_error_at_the_save_that_names_it(tmp_path, what):
    """Also at a periodic save, where a full disk is only a warning; the older checkpoint is untouched."""
    value, message = UNSAVABLE[what]

    def during(run: Run) -> None:
        if run.global_step == 4:
            run.state["best"] = value

    with pytest.raises(RegisterError, match=rf"no checkpoint at step 6: rank 0: {message}"):
        train(tmp_path, 9, during=during)
    assert names(tmp_path) == ["step-00000003"]
    assert flaw(read_committed(tmp_path / "checkpoints" / "step-00000003")) is None


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(1 << 2038), 1 << 2038),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters()),
    st.binary(min_size=1, max_size=400),
    st.sampled_from([torch.float16, torch.device("cpu"), torch.device("cuda", 3), torch.Size([2, 0])]),
    st.builds(
        lambda shape, dtype: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from(
            [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e5m2]
        ),
    ),
)
keys = st.one_of(
    st.text(max_size=5), st.integers(), st.booleans(), st.tuples(st.integers(), st.text(max_size=3))
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(st.text(max_size=5), st.integers(0, 9), max_size=4).map(Counter),
        st.sets(st.one_of(st.integers(), st.text(max_size=4)), max_size=4),
    ),
    max_leaves=12,
)


def same(a: object, b: object) -> bool:
    """Whether two trees are equal in types, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return repr(a) == repr(b) if isinstance(a, (float, complex)) else a == b


@settings(max_examples=200, deadline=None)
@given(tree=trees)
def test_whatever_passes_the_check_comes_back_equal(tmp_path_factory, tree):
    """A state that is accepted at a save is never refused, nor altered, at the restore."""
    state.check(tree, "tree")
    path = tmp_path_factory.getbasetemp() / "tree.pt"
    size, digest = image.write(path, tree)
    assert (path.stat().st_size, image.digest(path)) == (size, digest)
    assert same(image.read(path), tree)


# ---- disks that are full, and other ranks


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    options = f"size=4m,uid={os.geteuid()},gid={os.getegid()}"
    try:
        done = subprocess.run(
            [*sudo, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        pytest.skip(f"a small file system cannot be mounted: {error}")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run([*sudo, "umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Write a file that leaves so many bytes free."""
    free = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return filler


def test_a_full_disk_at_a_periodic_save_is_a_warning(small_disk):
    """The training goes on, the older checkpoint stays as it was, and the next save succeeds."""
    folder = small_disk / "run"
    before: dict[str, bytes] = {}

    def during(run: Run) -> None:
        if run.global_step == 4:
            before.update(contents(folder / "checkpoints" / "step-00000003"))
            fill(small_disk, leave=400_000)
        if run.global_step == 7:
            assert names(folder) == ["step-00000003"]
            assert contents(folder / "checkpoints" / "step-00000003") == before
            assert flaw(read_committed(folder / "checkpoints" / "step-00000003")) is None
            (small_disk / "filler").unlink()

    trained = train(folder, 10, size=100_000, during=during)  # 0.8 MB of weights
    assert trained.run.global_step == 10
    assert len(trained.said) == 1
    warned = trained.said[0]
    assert warned.startswith("warning: no checkpoint at step 6: rank 0: ")
    assert "No space left on device (0.8 MB needed, 0.4 MB free); the training goes on without it" in warned
    assert [event["step"] for event in journal.events(RunDir(folder), "unsaved")] == [6]
    assert names(folder) == ["step-00000003", "step-00000009"]
    assert train(folder, 11, size=100_000).run.restored_from.step == 9


def test_room_is_made_for_the_next_checkpoint_while_there_is_time(small_disk):
    """Where the next one will not fit, fewer are kept, never fewer than one, before it is due."""
    folder = small_disk / "run"
    events = RunDir(folder)

    def during(run: Run) -> None:
        if run.global_step == 5:
            fill(small_disk, leave=1_000_000)  # the checkpoint of step 6 fits, none after it
        if run.global_step == 7:
            assert names(folder) == ["step-00000006"]
            (small_disk / "filler").unlink()
            fill(small_disk, leave=100_000)
        if run.global_step == 10:
            (small_disk / "filler").unlink()

    trained = train(folder, 13, size=100_000, keep=3, during=during)
    made, failed = trained.said
    assert re.search(
        r"0\.\d MB are free in .*, a checkpoint needs 0\.8 MB; removed step-00000003 to make room", made
    )
    assert "no checkpoint at step 9: rank 0: " in failed
    assert [event["removed"] for event in journal.events(events, "space")] == [["step-00000003"]]
    assert names(folder) == ["step-00000006", "step-00000012"]


def test_a_save_that_finds_the_disk_full_takes_the_room_of_an_older_checkpoint(small_disk):
    """What nobody could see coming, as with a quota: the save is made again, in the older one's room."""
    folder = small_disk / "run"

    def during(run: Run) -> None:
        if run.global_step == 7:
            fill(small_disk, leave=400_000)
        if run.global_step == 10:
            (small_disk / "filler").unlink()

    trained = train(folder, 10, size=100_000, keep=3, during=during)
    assert re.search(r"No space left on device .*; removed step-00000003 to make room", trained.said[0])
    assert names(folder) == ["step-00000009"]  # and so that the next one fits, without the other


def test_a_disk_too_full_for_another_checkpoint_is_told_of_once(small_disk):
    """While there is time to do something about it, and not at the deadline."""
    folder = small_disk / "run"

    def during(run: Run) -> None:
        if run.global_step == 2:
            fill(small_disk, leave=1_000_000)

    trained = train(folder, 10, size=100_000, during=during)
    assert re.search(
        r"MB are free in .*: the next one will fail. Make room before the job ends", trained.said[0]
    )
    assert [bool(re.search(r"no checkpoint at step \d", line)) for line in trained.said[1:]] == [True, True]


def test_a_disk_without_a_byte_left_ends_no_training_and_loses_no_metric(small_disk):
    """What was logged meanwhile is kept in memory, and written when there is room again."""
    folder = small_disk / "run"

    def during(run: Run) -> None:
        run.log(note="y" * 5000)
        if run.global_step == 4:
            fill(small_disk, leave=0)
        if run.global_step == 7:
            (small_disk / "filler").unlink()

    trained = train(folder, 10, size=1000, during=during)
    assert trained.run.global_step == 10
    assert "metrics.jsonl could not be written: No space left on device" in trained.said[0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "note" in line] == list(range(10))
    assert names(folder) == ["step-00000003", "step-00000009"]


def test_a_full_disk_at_the_final_save_fails_the_run_and_leaves_the_older_checkpoint(small_disk, tmp_path):
    """Exit code 1, what failed and how much is free; with room again the same command ends the run."""
    file = tmp_path / "full.yaml"
    described = {
        "function": f"{FAULTS / 'full_disk.py'}:train",
        "dir": str(small_disk / "runs"),
        "checkpoint": {"every": {"steps": 3}},
        "args": {"disk": str(small_disk), "leave": 200_000},
    }
    file.write_text(json.dumps(described))
    command = [sys.executable, "-m", "chainrun", "run", str(file)]
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1, failed.stderr
    assert "no checkpoint at step 4: rank 0: " in failed.stderr
    assert "No space left on device (0.8 MB needed, 0.2 MB free)" in failed.stderr
    assert "Traceback" not in failed.stderr
    run = RunDir(small_disk / "runs" / "full")
    assert run.failed.exists()
    assert not run.done.exists()
    found = Store(run).committed()
    assert [(checkpoint.step, flaw(checkpoint)) for checkpoint in found] == [(3, None)]

    (small_disk / "filler").unlink()
    done = subprocess.run(
        [*command, "args.leave=null", "--override"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "resumes at step 3" in done.stderr
    assert run.done.exists()
    assert not run.failed.exists()


def limited(folder: str) -> None:
    """Save with the size of files limited to 1 MB: the same error of the disk, wherever tests run."""

    def during(run: Run) -> None:
        if run.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))

    print(train(Path(folder), 10, size=200_000, during=during).said)


def test_a_limit_on_the_size_of_files_is_a_warning_too(tmp_path):
    """A quota, or a limit of the shell, that a checkpoint runs into does not end a periodic save's training."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_store; test_store.limited(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("File too large") == 2
    assert names(tmp_path) == ["step-00000003"]


def test_a_line_torn_by_a_full_disk_takes_no_other_with_it(small_disk):
    """A line that does not fit leaves the file as it was; a torn one from a crash stands alone."""
    file = small_disk / "journal"
    append_lines(file, [{"line": 1}])
    filler = fill(small_disk, leave=0)
    with pytest.raises(OSError, match="No space left"):
        append_lines(file, [{"line": 2, "text": "x" * 100_000}])
    filler.unlink()
    append_lines(file, [{"line": 3}])
    with open(file, "ab") as torn:
        torn.write(b'{"line": 4, "te')
    append_lines(file, [{"line": 5}])
    assert [line["line"] for line in read_lines(file)] == [1, 3, 5]


class Ranks:
    """Two ranks as threads of this process."""

    def __init__(self, rank: int, shared: dict, barrier: threading.Barrier) -> None:
        self.rank, self.world_size, self._shared, self._barrier = rank, 2, shared, barrier

    def _of_all(self, value: object) -> list:
        self._shared[self.rank] = value
        self._barrier.wait(60)
        found = [self._shared[rank] for rank in range(2)]
        self._barrier.wait(60)
        return found

    def gather(self, value: object) -> list | None:
        found = self._of_all(value)
        return found if self.rank == 0 else None

    def broadcast(self, value: object) -> object:
        return self._of_all(value)[0]


def save_by_two(store: Store, step: int, trees: list[dict]) -> list[object]:
    """Save one tree a rank; return what each rank got or was told."""
    shared: dict = {}
    barrier = threading.Barrier(2)
    answers: list[object] = [None, None]

    def one(rank: int) -> None:
        try:
            ranks = Ranks(rank, shared, barrier)
            mine = writer.without_replicas(ranks, writer.ready(trees[rank]))
            answers[rank] = writer.save(store, ranks, step, mine, {})[0]
        except Exception as error:
            answers[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_a_checkpoint_is_of_all_ranks_or_of_none(tmp_path):
    """Where one rank cannot write, every rank is told which and why, and nothing is committed."""
    store = Store(RunDir(tmp_path).create())
    path = store.path_for(1)
    assert save_by_two(store, 1, [{"a": 1}, {"a": 2}]) == [path, path]
    committed = read_committed(path)
    assert committed.manifest["world_size"] == 2
    assert flaw(committed) is None
    assert [image.read(path / rank_file(rank)) for rank in range(2)] == [{"a": 1}, {"a": 2}]

    answers = save_by_two(store, 2, [{"a": 1}, {"state": {"best": np.array(["a"])}}])
    for answer in answers:
        assert isinstance(answer, RegisterError)
        assert "no checkpoint at step 2: rank 1: run.state.best is a numpy.ndarray" in str(answer)
    assert names(tmp_path) == ["step-00000001"]
    (path / rank_file(1)).unlink()
    assert flaw(committed) == "rank-00001.pt: No such file or directory"
    assert Store(RunDir(tmp_path)).newest() is None


def test_what_ranks_hold_alike_is_written_once(tmp_path):
    """The second rank's file has what differs by a bit, in kind or in name only; all of it comes back, tied as it was."""
    store = Store(RunDir(tmp_path).create())

    def tree(rank: int) -> dict:
        weight = torch.arange(100.0).reshape(10, 10)
        mean = torch.zeros(100)
        mean[7] = -0.0 if rank else 0.0
        kind = torch.zeros(100, dtype=torch.int32 if rank else torch.float32)
        small = torch.tensor([1.0])
        net = {
            "weight": weight,
            "tied": weight,
            "turned": weight.T,
            "mean": mean,
            "kind": kind,
            "small": small,
        }
        return {"objects": {"net": net, "other": {f"name{rank}": torch.ones(100)}}, "rank": rank}

    trees = [tree(0), tree(1)]
    path, _ = save_by_two(store, 1, trees)
    first, second = (torch.load(path / rank_file(rank), weights_only=True) for rank in range(2))
    assert "replicated" not in first
    left_out = {name for name, tensor in second["objects"]["net"].items() if tensor.is_meta}
    assert left_out == {"weight", "tied", "turned"}
    assert not second["objects"]["other"]["name1"].is_meta
    for rank in range(2):
        saved = Checkpoint(path).load(rank)
        expected = trees[rank]["objects"]
        assert saved.keys() == expected.keys()
        assert same(saved, expected)
        assert saved["net"]["weight"].data_ptr() == saved["net"]["tied"].data_ptr()
    assert math.copysign(1, Checkpoint(path).load(1)["net"]["mean"][7]) == -1
