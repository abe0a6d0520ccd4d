"""Weights on huge pages (Linux): a decoder reads all of them for every token, and 4 kB pages cost address lookups.

The kernel's default ("madvise") gives huge pages only to who asks. ONNX Runtime does not; so memory that opening a
session brought is asked for afterwards: ``madvise(MADV_COLLAPSE)``, Linux 6.1 and newer. Contents do not change.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Generator
from pathlib import Path

_HUGE = 2 << 20
_LEAST = 4 * _HUGE  # smaller areas are not worth the call
_COLLAPSE = 25  # MADV_COLLAPSE, linux/mman.h
_MAPS = Path("/proc/self/maps")
# Private writable memory without a file; the heap too.
_ANONYMOUS = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0\s*(\[heap\])?$")


@contextlib.contextmanager
def huge_pages(wanted: bool = True) -> Generator[None]:
    """Puts what is allocated inside the ``with`` block on huge pages at its end, where the system can."""
    if not wanted or sys.platform != "linux" or not _MAPS.exists():
        yield
        return
    before = _areas()
    yield
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in _new(before, _areas()):
        first, last = -(-start // _HUGE) * _HUGE, end // _HUGE * _HUGE
        if last - first >= _LEAST and library.madvise(first, last - first, _COLLAPSE) != 0:
            continue  # an older kernel, or no free huge pages: the memory stays as it is


def _areas() -> list[tuple[int, int]]:
    lines = _MAPS.read_text().splitlines()
    found = [match for line in lines if (match := _ANONYMOUS.match(line))]
    return [(int(match[1], 16), int(match[2], 16)) for match in found]


def _new(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of ``after`` that ``before`` does not cover; both sorted and without overlaps."""
    parts: list[tuple[int, int]] = []
    for start, end in after:
        for old_start, old_end in before:
            if old_end <= start or old_start >= end:
                continue
            if old_start > start:
                parts.append((start, old_start))
            start = max(start, old_end)
        if start < end:
            parts.append((start, end))
    return parts
