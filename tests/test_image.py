"""The file of a rank: laid out as torch.save would have it read, written in a pipeline, verified as it is read."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainrun.checkpoint import archive, image, source
from chainrun.checkpoint.layout import Planner
from chainrun.errors import CheckpointError


class Tagged(torch.Tensor):
    """A subclass that torch.load knows as safe."""


def by_torch(tree: Any, path: Path) -> Any:
    torch.save(tree, path)
    return torch.load(path, weights_only=True)


def through(tree: Any, path: Path, planner: Planner | None = None) -> Any:
    """Write and read a tree, verified."""
    size, digest = image.write(path, tree, planner)
    assert (path.stat().st_size, image.digest(path)) == (size, digest)
    return image.read(path, size, digest)


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()
    return plain.flatten().view(torch.uint8).numpy().tobytes()


def alike(one: Any, other: Any) -> None:
    """Fail where two trees differ in a type, a bit, a shape, a stride or a flag of a tensor."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        for fact in ("shape", "dtype", "layout", "requires_grad", "is_quantized", "is_meta"):
            assert getattr(one, fact) == getattr(other, fact), fact
        assert (one.is_conj(), one.is_neg()) == (other.is_conj(), other.is_neg())
        alike(vars(one), vars(other))
        if one.layout is torch.sparse_coo:
            assert one.is_coalesced() == other.is_coalesced()
            return alike([one._indices(), one._values()], [other._indices(), other._values()])
        if one.layout is not torch.strided:
            rows = one.layout in (torch.sparse_csr, torch.sparse_bsr)
            parts = ("crow_indices", "col_indices") if rows else ("ccol_indices", "row_indices")
            return alike(*([getattr(t, part)() for part in (*parts, "values")] for t in (one, other)))
        assert one.stride() == other.stride()
        if one.is_quantized:
            assert (one.q_scale(), one.q_zero_point()) == (other.q_scale(), other.q_zero_point())
            one, other = one.int_repr(), other.int_repr()
        assert one.is_meta or bits(one) == bits(other)
    elif isinstance(one, dict):
        assert list(one) == list(other)  # the order too
        alike(list(one.values()), list(other.values()))
        if type(one) is not dict:
            alike(vars(one), vars(other))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            alike(a, b)
    else:
        assert repr(one) == repr(other)  # NaN too
    return None


PLAIN: dict[str, Any] = {
    "float": torch.randn(3, 4),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(3, 4).t(),
    "strided": torch.randn(20)[3:15:3],
    "expanded": torch.ones(1).expand(4, 5),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "complex": torch.randn(3, dtype=torch.complex64),
    "conjugated": torch.randn(3, dtype=torch.complex128).conj(),
    "negated": torch.randn(3, dtype=torch.complex64).conj().imag,
    "bfloat16": torch.randn(5).bfloat16(),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
    "bool": torch.tensor([True, False]),
    "trains": torch.ones(3, requires_grad=True),
    "not a leaf": torch.ones(3, requires_grad=True) * 2,
    "parameter": torch.nn.Parameter(torch.randn(3)),
    "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
    "meta": torch.empty(3, 2, dtype=torch.float16, device="meta"),
    "meta parameter": torch.nn.Parameter(torch.empty(2, device="meta")),
}


def with_attribute() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.note = {"a": torch.zeros(1)}  # type: ignore[attr-defined]
    return tensor


with pytest.warns():  # of CSR, and of quantization
    RARE: dict[str, Any] = {
        "coo": torch.eye(3).to_sparse(),
        "uncoalesced": torch.sparse_coo_tensor(
            torch.tensor([[0, 0]]), torch.ones(2), (3,), check_invariants=True
        ),
        "csr": torch.eye(3).to_sparse_csr(),
        "csc": torch.eye(3).to_sparse_csc(),
        "bsr": torch.eye(4).to_sparse_bsr((2, 2)),
        "bsc": torch.eye(4).to_sparse_bsc((2, 2)),
        "quantized": torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.quint8),
        "subclass": torch.randn(3).as_subclass(Tagged),
        "attribute": with_attribute(),
    }

OTHERS: dict[str, Any] = {
    "numbers": (1, -1, 255, 256, 70_000, -(1 << 40), 1 << 70, 2.5, float("nan"), 1j, True, None),
    "texts": ["", "é" * 300, b"x", b"\x00" * 300],
    "set": {1, "a"},
    "counter": Counter("aab"),
    "torch": [torch.Size([2, 3]), torch.float16, torch.device("cpu")],
    (1, "key"): {},
}


@pytest.fixture(autouse=True)
def _safe() -> Any:
    with torch.serialization.safe_globals([Tagged]):
        yield


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*PLAIN, *RARE])
def test_every_kind_of_tensor_comes_back_as_torch_would_bring_it(name: str, tmp_path: Path) -> None:
    """A tensor of any kind, alone and in two places, has all that it has after torch.save and torch.load."""
    tensor = {**PLAIN, **RARE}[name]
    tree = {"one": tensor, "again": [tensor], "plain": torch.arange(3)}
    loaded = through(tree, tmp_path / "a.pt")
    alike(loaded, by_torch(tree, tmp_path / "b.pt"))
    assert loaded["again"][0] is loaded["one"]
    for mmap in (False, True):
        alike(torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap), loaded)


def test_plain_data_comes_back_and_what_was_one_object_is_one(tmp_path: Path) -> None:
    """Containers, numbers and texts come back as after torch.save; a list in two places is one list."""
    ordered = OrderedDict(a=torch.ones(2))
    ordered._metadata = {"version": 1}  # type: ignore[attr-defined]  # as a module's state_dict has it
    shared = [1, torch.zeros(1)]
    tree = {**OTHERS, "ordered": ordered, "x": shared, "y": {"z": shared}}
    loaded = through(tree, tmp_path / "a.pt")
    alike(loaded, by_torch(tree, tmp_path / "b.pt"))
    assert loaded["x"] is loaded["y"]["z"]


def test_tied_tensors_and_views_share_memory_again_and_no_more_than_they_did(tmp_path: Path) -> None:
    """What overlaps in memory does so after a load, of one dtype or two; of a large buffer little is saved."""
    buffer = torch.arange(1_000_000.0)
    tree = {
        "a": buffer[10:20],
        "b": buffer[15:25],
        "bits": buffer.view(torch.int32)[18:22],
        "far": buffer[500_000:500_010],
        "other": torch.ones(3),
    }
    loaded = through(tree, tmp_path / "a.pt")
    alike(loaded, {name: tensor.clone() for name, tensor in tree.items()})
    loaded["b"][3] = -1.0
    assert loaded["a"][8] == -1.0
    assert loaded["bits"][0] == torch.tensor(-1.0).view(torch.int32)
    assert loaded["far"][0] == 500_000
    assert (tmp_path / "a.pt").stat().st_size < 4096


def test_a_buffer_of_numpy_seen_twice_is_one_again(tmp_path: Path) -> None:
    """Two tensors made from one array are one memory, though torch has a storage for each."""
    array = np.arange(4.0)
    loaded = through({"a": torch.from_numpy(array), "b": torch.from_numpy(array)}, tmp_path / "a.pt")
    loaded["a"][0] = 7
    assert loaded["b"][0] == 7


def test_an_empty_tree_and_a_tree_that_is_a_tensor(tmp_path: Path) -> None:
    """A tree may hold no tensor, or be one."""
    assert through({}, tmp_path / "a.pt") == {}
    alike(through(torch.arange(5), tmp_path / "a.pt"), torch.arange(5))


# ---- the plan ----------------------------------------------------------------------------------


def transposed(tree: dict[str, Any], key: str) -> None:
    if tree[key].dim() == 2 and not tree[key].requires_grad:
        tree[key].t_()


def resized(tree: dict[str, Any], key: str) -> None:
    if not tree[key].requires_grad:
        tree[key].data = torch.randn(tree[key].numel() + 1)


CHANGES: list[Any] = [
    lambda tree, key: tree[key].data.fill_(7),
    lambda tree, key: tree.update(step=tree["step"] + 1),
    lambda tree, key: tree.update({key: tree[key].detach().clone()}),
    lambda tree, key: tree.update({key: tree[key].detach()}),
    lambda tree, key: tree.update({key: tree[key].detach().double()}),
    lambda tree, key: tree.update({key: torch.nn.Parameter(tree[key].detach().float())}),
    lambda tree, key: tree.update({key: tree[key].detach()[1:]}) if tree[key].dim() else None,
    lambda tree, key: tree.update({key: tree["0"]}),
    lambda tree, key: (
        tree.update({key: tree["0"].detach().view(-1)[:2]}) if tree["0"].is_contiguous() else None
    ),
    lambda tree, key: tree.update({key: tree["0"].detach().view(torch.int32)}) if tree["0"].dim() else None,
    lambda tree, key: tree.update({key: torch.randn(2, dtype=torch.complex64).conj()}),
    lambda tree, key: tree.update({key: torch.empty(2, device="meta")}),
    lambda tree, key: tree.update({key: torch.eye(2).to_sparse()}),
    lambda tree, key: tree.update(extra={key: tree[key], "list": [tree[key]]}),
    lambda tree, key: tree.pop("extra", None),
    lambda tree, key: tree.update({key: tree.pop(key)}),
    lambda tree, key: tree[key].requires_grad_(tree[key].is_floating_point() and tree[key].is_leaf),
    transposed,
    resized,
]


def overlaps(tree: Any) -> list[tuple[int, int, int]]:
    """Return which tensors of a flat list of leaves begin in whose memory, and how far from its beginning."""
    leaves: list[torch.Tensor] = []

    def collect(part: Any) -> None:
        if isinstance(part, dict):
            part = list(part.values())
        if isinstance(part, list):
            for one in part:
                collect(one)
        elif (
            isinstance(part, torch.Tensor)
            and part.layout is torch.strided
            and part.numel()
            and not part.is_meta
        ):
            leaves.append(part)

    collect(tree)
    spans = []
    for leaf in leaves:
        reach = sum((n - 1) * s for n, s in zip(leaf.shape, leaf.stride(), strict=True)) + 1
        spans.append((leaf.data_ptr(), leaf.data_ptr() + reach * leaf.itemsize))
    return [
        (i, j, begin - other[0])
        for i, (begin, _) in enumerate(spans)
        for j, other in enumerate(spans)
        if i != j and other[0] <= begin < other[1]
    ]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.sampled_from([(), (3,), (2, 4), (0,), (4, 1, 3)]), min_size=2, max_size=5),
    changes=st.lists(st.tuples(st.integers(0, len(CHANGES) - 1), st.integers(1, 4)), max_size=8),
)
def test_a_plan_is_never_stale(shapes: Any, changes: Any, tmp_path: Path) -> None:
    """Whatever changes between saves, content, kinds or sharing, each file has what the tree has then."""
    tree: dict[str, Any] = {str(n): torch.randn(shape) for n, shape in enumerate([(2, 4), *shapes])}
    tree["step"] = 0
    planner, staging = Planner(), image.Staging()
    for number, key in [(0, 1), *changes]:
        with contextlib.suppress(RuntimeError, KeyError):  # a change that does not suit the tensor
            CHANGES[number](tree, str(key))
        if any(isinstance(v, torch.Tensor) and v.is_sparse for v in tree.values()):
            with contextlib.suppress(RuntimeError):  # torch refuses dtypes that share memory
                by_torch(tree, tmp_path / "b.pt")
                alike(through(tree, tmp_path / "a.pt", planner), by_torch(tree, tmp_path / "b.pt"))
            continue
        try:
            loaded = through(tree, tmp_path / "a.pt", planner)
        except CheckpointError as error:  # as torch does, and for the same reason
            assert "tensors of different dtypes share memory" in str(error)
            tensors = [v for v in tree.values() if isinstance(v, torch.Tensor)]
            assert any(
                type(v) is not torch.Tensor or v.requires_grad or v.is_conj() or v.is_meta for v in tensors
            )
            continue
        apart = {k: v for k, v in tree.items() if k != "extra"}  # one file each: no dtypes that share memory
        alike({k: loaded[k] for k in apart}, {k: by_torch(v, tmp_path / "b.pt") for k, v in apart.items()})
        assert overlaps(loaded) == overlaps(tree)
        staging.stage(tree)
        assert image.write(tmp_path / "c.pt", staging)[1] == image.digest(tmp_path / "a.pt")


def test_a_plan_is_kept_where_only_numbers_and_contents_change() -> None:
    """The plan of one save serves the next where tensors have other content, or are others of the same kind."""
    module = torch.nn.Linear(3, 4)
    planner = Planner()
    first = planner.content({"model": module.state_dict(), "step": 1})
    with torch.no_grad():
        module.weight.add_(1)
    tree = {"model": OrderedDict((k, v.clone()) for k, v in module.state_dict().items()), "step": 1 << 50}
    assert planner.content(tree).records is first.records
    tree["model"]["bias"] = tree["model"]["weight"][0]
    assert planner.content(tree).records is not first.records


# ---- large files -------------------------------------------------------------------------------


def test_more_tensors_than_a_zip_without_its_64_bit_fields_can_hold(tmp_path: Path) -> None:
    """65,600 tensors are written and read, by torch alone and by Python's zipfile too."""
    tree = list(torch.arange(65_600 * 2).view(-1, 2).clone().unbind())
    tree = [tensor.clone() for tensor in tree]
    image.write(tmp_path / "a.pt", tree)
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)
    assert torch.equal(torch.stack(loaded), torch.stack(tree))
    with zipfile.ZipFile(tmp_path / "a.pt") as opened:
        assert len(opened.namelist()) == 65_603
        assert opened.read("archive/version") == b"3\n"


def test_a_file_of_more_than_4_gib_is_laid_out_as_torch_reads_it(tmp_path: Path) -> None:
    """A storage of over 4 GiB and one that begins beyond are found by torch, mapped, in a file with holes."""
    sizes = [64, (4 << 30) + 64, 64]
    records = archive.Records(sizes)
    small = Planner().content([torch.zeros(16), torch.zeros(8), torch.arange(16.0)])
    pickle = small.tail[small.tail.index(b"\x80\x02") :]
    path = tmp_path / "large.pt"
    with open(path, "wb") as file:
        at = 0
        for offset, size in zip(records.offsets.tolist(), records.header_sizes.tolist(), strict=True):
            file.seek(offset - size)
            file.write(records.headers[at : at + size])
            at += size
        file.seek(int(records.offsets[2]))
        file.write(torch.arange(16.0).numpy().tobytes())
        file.write(records.tail(pickle))
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(loaded[2], torch.arange(16.0))
    assert torch.equal(loaded[1], torch.zeros(8))
    with zipfile.ZipFile(path) as opened:
        assert [one.file_size for one in opened.infolist()[:3]] == sizes


def several_chunks(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Let a small state have many chunks."""
    monkeypatch.setattr(image, "CHUNK", 64 << 10)
    monkeypatch.setattr(image, "_BIG", 32 << 10)
    monkeypatch.setattr(source, "CHUNK", 10_000)
    tree = {f"t{n}": torch.randn(997) for n in range(30)}
    return {**tree, "large": torch.randn(500_003), "last": torch.randn(5)}


@pytest.mark.parametrize("folder", ["disk", "/dev/shm"])
def test_a_file_of_many_chunks_is_whole(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of many more chunks than the ring has is written whole, on a disk and on a filesystem in memory."""
    tree = several_chunks(monkeypatch)
    path = tmp_path / "a.pt" if folder == "disk" else Path(folder) / f"chainrun-{os.getpid()}.pt"
    try:
        alike(through(tree, path), tree)
        assert not path.stat().st_mode & 0o111
    finally:
        path.unlink(missing_ok=True)


def test_a_filesystem_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where O_DIRECT is refused, at open or only at a write, the file is written through the page cache."""
    tree = several_chunks(monkeypatch)
    real_open, real_write = os.open, os.pwrite

    def refuse_open(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, mode)

    def refuse_write(file: int, data: Any, at: int) -> int:
        import fcntl

        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse_open)
        alike(through(tree, tmp_path / "a.pt"), tree)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse_write)
        alike(through(tree, tmp_path / "a.pt"), tree)


# ---- faults ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A filesystem of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if (
        os.getuid()
        or not shutil.which("mount")
        or subprocess.run(mount, check=False, capture_output=True).returncode
    ):
        pytest.skip("a small filesystem cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("staged", [False, True])
def test_a_full_disk_is_told_and_nothing_is_left(
    small_disk: Path, staged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No space: the error says so with both sizes, the file is gone, no thread stays, and a smaller one fits."""
    tree: Any = {**several_chunks(monkeypatch), "more": torch.zeros(2_000_000)}
    threads = threading.active_count()
    what = image.Staging() if staged else tree
    if staged:
        what.stage(tree)
    with pytest.raises(
        CheckpointError, match=r"a.pt could not be written: No space left .*10.1 MB needed, 4.2 MB free"
    ):
        image.write(small_disk / "a.pt", what)
    assert not list(small_disk.iterdir())
    assert threading.active_count() == threads
    through({"a": torch.ones(3)}, small_disk / "a.pt")


@pytest.mark.parametrize("call", ["fsync", "ftruncate"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_late(
    call: str, error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that says only at the end that it could not write is believed."""

    def fail(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    tree = several_chunks(monkeypatch)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(CheckpointError, match=os.strerror(error)):
        image.write(tmp_path / "a.pt", tree)
    assert not (tmp_path / "a.pt").exists()


def test_what_torch_cannot_save_is_told(tmp_path: Path) -> None:
    """An object that no pickle holds, and dtypes that share memory where torch refuses them, are errors."""
    with pytest.raises(CheckpointError, match="could not be written"):
        image.write(tmp_path / "a.pt", {"a": threading.Lock()})
    base = torch.ones(4)
    with pytest.raises(CheckpointError, match="share memory"):
        image.write(
            tmp_path / "a.pt", {"a": base, "b": base.view(torch.int32), "c": torch.eye(2).to_sparse()}
        )
    assert not (tmp_path / "a.pt").exists()


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that changed in a header, in a tensor, in the pickle or in the directory: read says that it did."""
    tree = several_chunks(monkeypatch)
    path = tmp_path / "a.pt"
    size, digest = image.write(path, tree)
    content = path.read_bytes()
    for at in (0, 40, 70, 64 << 10, size // 2, content.index(b"large"), size - 300, size - 1):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(CheckpointError, match=r"the content of .*a\.pt has changed since it was written"):
            image.read(path, size, digest)
    path.write_bytes(content[:-7])
    with pytest.raises(CheckpointError, match=rf"a\.pt has {size - 7} bytes instead of {size}"):
        image.read(path, size, digest)
    with pytest.raises(CheckpointError, match="cannot be opened"):
        image.read(path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        image.read(tmp_path / "none.pt")
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        image.read(path)


# ---- reading -----------------------------------------------------------------------------------


def open_files(folder: Path) -> list[str]:
    """Return what this process has open of a folder's files and of memory's; other threads open others."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in found if str(folder) in name or "memfd:" in name)


@pytest.mark.parametrize("memfd", [True, False])
def test_what_is_read_is_private_and_leaves_no_file_open(
    memfd: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that were read can be written to, which changes neither the file nor a forked process's tensors."""
    if not memfd:
        monkeypatch.delattr(os, "memfd_create")
    tree = several_chunks(monkeypatch)
    size, digest = image.write(tmp_path / "a.pt", tree)
    before = open_files(tmp_path)
    loaded = image.read(tmp_path / "a.pt", size, digest)
    assert open_files(tmp_path) == before
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    child = os.fork()
    if not child:
        loaded["large"].data_ptr()
        ctypes.memset(loaded["large"].data_ptr(), 1, 4096)
        os._exit(0)
    os.waitpid(child, 0)
    alike(loaded, tree)
    loaded["large"].zero_()
    assert image.digest(tmp_path / "a.pt") == digest


def test_a_file_is_read_and_verified_before_torch_is_there(tmp_path: Path) -> None:
    """What reads and hashes a file imports no torch."""
    size, digest = image.write(tmp_path / "a.pt", {"a": torch.arange(3)})
    code = (
        "import sys; from pathlib import Path; from chainrun.checkpoint import source\n"
        f"memory = source.load(Path({str(tmp_path / 'a.pt')!r}), {size}, {digest!r})\n"
        "print([m for m in ('torch', 'numpy') if m in sys.modules])\n"
        "from chainrun.checkpoint import image\n"
        "print(image.read(memory)['a'].tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[0, 1, 2]"]


# ---- staging -----------------------------------------------------------------------------------


def test_the_training_goes_on_while_what_was_staged_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has the state as it was when it was staged, however it changes while another thread writes."""
    tree: Any = {**several_chunks(monkeypatch), "step": 1}
    expected = {name: value.clone() for name, value in tree.items() if name != "step"}
    staging = image.Staging()
    staging.stage(tree)
    for value in expected:
        tree[value].zero_()
    writing = threading.Thread(target=image.write, args=(tmp_path / "a.pt", staging))
    writing.start()
    for _ in range(20):
        for value in expected:
            tree[value].add_(1)
        tree["step"] += 1
    writing.join()
    alike(image.read(tmp_path / "a.pt"), {**expected, "step": 1})


def test_staged_memory_is_used_again_and_grows(tmp_path: Path) -> None:
    """A second state of the same size takes no new memory; a larger one, and a smaller one after it, fit."""
    staging = image.Staging()
    for tree in (
        {"a": torch.ones(9)},
        {"a": torch.zeros(9)},
        {"a": torch.ones(3_000_000)},
        {"b": torch.ones(2)},
    ):
        staging.stage(tree)
        image.write(tmp_path / "a.pt", staging)
        alike(image.read(tmp_path / "a.pt"), tree)
    assert staging.nbytes == staging.nbytes // (2 << 20) * (2 << 20) >= 12_000_000


def test_a_failed_staging_leaves_nothing_to_be_written(tmp_path: Path) -> None:
    """After an error of stage there is nothing staged, not the state before."""
    staging = image.Staging()
    staging.stage({"a": 1})
    with pytest.raises(CheckpointError, match="could not be copied"):
        staging.stage({"a": threading.Lock()})
    with pytest.raises(CheckpointError, match="nothing is staged"):
        image.write(tmp_path / "a.pt", staging)


def test_equal_memory_has_equal_digests() -> None:
    """Two states of the same structure differ in the digest of just the memory that differs; ties count once."""
    tied = torch.ones(3)
    one = image.digests({"a": tied, "tied": tied, "b": torch.zeros(2), "step": 1})
    other = image.digests({"a": (t := torch.ones(3)), "tied": t, "b": torch.ones(2), "step": 2})
    assert one[0] == other[0] == xxhash.xxh3_128_hexdigest(tied.numpy())
    assert (len(one), len(other)) == (2, 2)
    assert one[1] != other[1]
