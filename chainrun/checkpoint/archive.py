"""The bytes of a zip around tensors that lie where they are: what `torch.load` opens, its mmap too.

Records ``archive/data/0``, ``archive/data/1``, … come first, uncompressed, each at a multiple of 64 bytes, so that
where they lie depends on their sizes alone; ``data.pkl``, ``byteorder``, ``version`` and the directory follow them,
and only these change from save to save. Torch's own ``.format_version`` is left out: it promises gaps between the
records as torch's writer leaves them; without it torch asks the directory. Torch and ``python -m zipfile -l`` check
no CRC-32 of the data, which are 0 here: xxh3_128 of the whole file, kept beside it, is what vouches for it.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Sequence

import numpy as np

ALIGNMENT = 64
_ARCHIVE = b"archive/"
_MANY = 0xFFFF  # from this many records on, and from _LONG bytes on, zip has fields of its own
_LONG = 0xFFFFFFFF
_FIELDS = (0, 0, 0, 0x21)  # no flags, stored, midnight, 1 January 1980


class Records:
    """The records of the tensors' bytes: where in the file they lie, and the headers between them.

    Args:
        sizes: bytes of each record.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        headers, directory, lengths, at = [], [], [], 0
        for number, size in enumerate(sizes):
            name = b"%sdata/%d" % (_ARCHIVE, number)
            header = _header(name, size, 0, align=at)
            headers.append(header)
            directory.append(_entry(name, size, 0, at))
            lengths.append(len(header))
            at += len(header) + size
        self.count = len(headers)
        self.headers = b"".join(headers)
        self.header_sizes = np.array(lengths, dtype=np.int64)
        self.sizes = np.array(sizes, dtype=np.int64)
        ends = np.cumsum(self.header_sizes + self.sizes)
        self.offsets = ends - self.sizes
        self.end = at
        """Bytes of the file before `tail`."""
        self._directory = b"".join(directory)

    def tail(self, pickle: bytes) -> bytes:
        """Return what follows the tensors: the other records and the directory."""
        parts, entries, at = [], [self._directory], self.end
        for name, content in (
            (_ARCHIVE + b"data.pkl", pickle),
            (_ARCHIVE + b"byteorder", sys.byteorder.encode()),
            (_ARCHIVE + b"version", b"3\n"),
        ):
            crc = zlib.crc32(content)
            parts += [_header(name, len(content), crc), content]
            entries.append(_entry(name, len(content), crc, at))
            at += len(parts[-2]) + len(content)
        directory = b"".join(entries)
        return b"".join((*parts, directory, _end(self.count + 3, len(directory), at)))


def _header(name: bytes, size: int, crc: int, align: int | None = None) -> bytes:
    """Return what stands before a record; with `align`, its offset, the record begins at a multiple of 64."""
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LONG else b""
    if align is not None:
        pad = -(align + 30 + len(name) + len(extra) + 4) % ALIGNMENT
        extra += b"FB" + struct.pack("<H", pad) + bytes(pad)  # the id that torch pads with
    short = min(size, _LONG)
    version = 45 if size >= _LONG else 20
    return (
        struct.pack("<IHHHHHIIIHH", 0x04034B50, version, *_FIELDS, crc, short, short, len(name), len(extra))
        + name
        + extra
    )


def _entry(name: bytes, size: int, crc: int, at: int) -> bytes:
    """Return a record's line in the directory."""
    long = [*([size, size] if size >= _LONG else []), *([at] if at >= _LONG else [])]
    extra = struct.pack(f"<HH{len(long)}Q", 1, 8 * len(long), *long) if long else b""
    short, version = min(size, _LONG), 45 if long else 20
    numbers = (crc, short, short, len(name), len(extra), 0, 0, 0, 0, min(at, _LONG))
    return struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, version, version, *_FIELDS, *numbers) + name + extra


def _end(count: int, size: int, at: int) -> bytes:
    """Return the end of the file, for a directory of `count` lines and `size` bytes at `at`."""
    long = b""
    if count >= _MANY or size >= _LONG or at >= _LONG:
        long = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, at)
        long += struct.pack("<IIQI", 0x07064B50, 0, at + size, 1)
    short = (min(count, _MANY), min(count, _MANY), min(size, _LONG), min(at, _LONG))
    return long + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, *short, 0)
