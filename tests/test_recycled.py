"""Files of a retired checkpoint are written over by the next save, unless somebody else would see it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chainrun.checkpoint import image, recycled
from chainrun.checkpoint.public import Checkpoint
from chainrun.checkpoint.store import Store
from chainrun.rundir import RunDir
from chainrun.training.run import Run
from chainrun.training.saving import Setting


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that may be written over."""
    path = tmp_path / "old.pt"
    image.write(path, {"a": torch.zeros(5000)})
    file = recycled.opened(path)
    if file is None:
        pytest.skip("the filesystem here is of no kind whose files are written over")
    os.close(file)
    yield path


def inode(path: Path) -> int:
    return path.stat().st_ino


@pytest.mark.parametrize("size", [10, 5000, 90_000])
def test_a_file_is_written_over_whatever_its_size_was(old: Path, size: int) -> None:
    """It is the same file on the disk, and holds what was written last and nothing more."""
    before = inode(old)
    bytes_, digest = image.write(old, {"b": torch.ones(size)})
    assert inode(old) == before
    assert old.stat().st_size == bytes_
    assert torch.equal(image.read(old, bytes_, digest)["b"], torch.ones(size))


def test_a_file_that_somebody_reads_maps_or_links_to_stays_as_it_is(old: Path, tmp_path: Path) -> None:
    """A new one takes its name; an evaluation that mapped a checkpoint does not see another one's weights."""
    content = old.read_bytes()
    with open(old, "rb") as reader:
        image.write(old, {"b": torch.ones(5000)})
        assert reader.read() == content
    image.write(old, {"a": torch.zeros(5000)})
    with open(old, "rb") as reader:
        mapped = mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ)
    image.write(old, {"b": torch.ones(5000)})
    assert mapped[:] == content
    mapped.close()
    image.write(old, {"a": torch.zeros(5000)})
    os.link(old, tmp_path / "link")
    image.write(old, {"b": torch.ones(5000)})
    assert (tmp_path / "link").read_bytes() == content


def test_only_filesystems_of_one_machine_are_written_over(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine somebody may read what nobody here does."""
    assert recycled.is_possible(old.parent)
    monkeypatch.setattr(recycled, "_kind", lambda file: 0x6969)  # NFS
    assert recycled.opened(old) is None
    assert not recycled.is_possible(old.parent)


def test_a_training_keeps_one_retired_directory_between_its_saves_and_none_when_it_ends(
    old: Path, tmp_path: Path
) -> None:
    """It bears no checkpoint's name and has no manifest; from the third save on the same files take turns."""
    run = Run(tmp_path / "run", setting=Setting(save_every_steps=1, keep=2, background=True))
    model = torch.nn.Linear(50, 50)
    run.register(model=model)
    inodes, folder = [], tmp_path / "run" / "checkpoints"
    for index in run.steps(9):
        run._saving.settle()
        if index:
            newest = max(folder.glob("step-????????"))
            inodes.append(inode(newest / "rank-00000.pt"))
            spare = [sorted(path.name for path in one.iterdir()) for one in folder.glob("*.tmp")]
            assert spare == [["rank-00000.pt"]] * (index > 2)
        torch.nn.init.constant_(model.weight, index + 1.0)
    run._close()
    assert inodes[3:] == inodes[:-3]
    assert len(set(inodes)) == 3
    assert not list(folder.glob("*.tmp"))
    for checkpoint in Store(RunDir(tmp_path / "run")).committed():
        weight = Checkpoint(checkpoint.path).load()["model"]["weight"]
        assert torch.equal(weight, torch.full((50, 50), float(checkpoint.step)))
