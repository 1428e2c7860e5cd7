"""What a device holds is copied beside the training: the order of things, on a device that is slower than any real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chainrun.checkpoint import device, image, layout

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Late:
    """Copies nothing before somebody waits for it; what is copied from must not have been touched until then."""

    def __init__(self, _: torch.device) -> None:
        self.asked: Pairs = []
        self.count = 0

    def begin(self, copies: Pairs) -> None:
        # what a stream does in order: the source as it is when everything before has been done
        self.asked += [(target, source.clone()) for target, source in copies]
        self.count += len(copies)

    def wait(self) -> None:
        for target, source in self.asked:
            target.copy_(source)
        self.asked = []

    def room(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Late]]:
    """Let every tensor of 4 bytes or more be on a device; return the streams that were made."""
    made: list[Late] = []

    def make(where: torch.device) -> Late:
        made.append(Late(where))
        return made[-1]

    class Elsewhere(layout.Content):
        def __init__(self, records: Any, data: bytes, addresses: Any, elsewhere: Any, keep: Any) -> None:
            here = {
                number: torch.frombuffer(image._bytes(int(address), int(size)), dtype=torch.uint8)
                for number, (address, size) in enumerate(zip(addresses, records.sizes, strict=True))
                if size >= 4
            }
            super().__init__(records, data, addresses, here, keep)

    monkeypatch.setattr(layout, "Content", Elsewhere)
    monkeypatch.setattr(device, "_stream", make)
    return made


def state(value: float) -> dict[str, Any]:
    small = {f"small{n}": torch.full((n + 1,), value + n) for n in range(50)}
    return {**small, "large": torch.full((600_000,), value), "flag": torch.tensor([True]), "step": int(value)}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


def test_a_state_is_asked_for_in_few_copies_and_complete_when_it_is_written(
    streams: list[Late], tmp_path: Path
) -> None:
    """Fifty small tensors are one copy; the training changes all of them before any is made."""
    staging = image.Staging()
    for value in (1.0, 2.0):
        tree = state(value)
        staging.stage(tree)
        (stream,) = streams
        assert len(stream.asked) == 2  # the large one, and the small ones together
        for key in tree.keys() - {"step"}:
            tree[key].zero_()
        image.write(tmp_path / "a.pt", staging)
        assert equal(image.read(tmp_path / "a.pt"), state(value))


def test_copies_of_a_save_that_was_given_up_do_not_reach_the_next_one(
    streams: list[Late], tmp_path: Path
) -> None:
    """What was staged and never written is waited for, and forgotten."""
    staging = image.Staging()
    staging.stage(state(1.0))
    staging.stage(state(2.0))
    image.write(tmp_path / "a.pt", staging)
    assert equal(image.read(tmp_path / "a.pt"), state(2.0))


def test_the_last_save_takes_a_devices_state_in_pieces(
    streams: list[Late], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the ring: every chunk waits for its own copies, and tensors are cut where chunks are."""
    monkeypatch.setattr(image, "CHUNK", 64 << 10)
    monkeypatch.setattr(device, "_SMALL", 16 << 10)
    image.write(tmp_path / "a.pt", state(3.0))
    assert equal(image.read(tmp_path / "a.pt"), state(3.0))
    assert streams[0].count > 30


def test_a_hash_on_the_device_sees_every_bit_and_every_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit, two words that change places, another length, x and its complement: all hashes differ."""
    monkeypatch.setattr(device, "_SMALL", 64)
    monkeypatch.setattr(device, "_WORDS", 50)
    whole = torch.randint(0, 256, (1003,), dtype=torch.uint8)
    others = [whole, ~whole, whole[:1000], whole[:1002], whole[1:], torch.roll(whole, 8), whole.flip(0)]
    others += [torch.zeros(size, dtype=torch.uint8) for size in (64, 65, 72, 400, 408)]
    for at in range(len(whole)):
        others.append(whole.clone())
        others[-1][at] ^= 1 << (at % 8)
    for at in range(0, 984, 24):
        others.append(whole.clone())
        others[-1][at : at + 16] = torch.cat([whole[at + 8 : at + 16], whole[at : at + 8]])
    small = [whole[:40], whole[1:41], whole[:0]]
    found = device.digests([*others, *small])
    assert len(set(found)) == len(found)
    assert {len(one) for one in found} == {16}
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), whole])[3:]  # on no address of words
    assert device.digests([whole[:40], whole, shifted]) == [found[len(others)], found[0], found[0]]
