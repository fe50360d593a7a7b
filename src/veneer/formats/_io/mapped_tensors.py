"""Memory-mapped tensors of safetensors files, whose pages are released again within a conversion."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from .header import HeaderEntry

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
RESIDENT = 32 * 2**20  # bytes of files in memory at a time inside `release_pages`
_BUDGET: ContextVar[PageBudget | None] = ContextVar("page_budget", default=None)


class MappedTensors:
    """The tensors of a file whose header has been checked. The file is mapped when the first one is read.

    Args:
        start: of the first tensor's bytes. `entries`: of the header, by name.
    """

    def __init__(self, path: Path, start: int, entries: Mapping[str, HeaderEntry]) -> None:
        self.path, self.start, self.entries = path, start, entries
        self._pages: mmap.mmap | None = None

    def tensor(self, name: str) -> Tensor:
        """A tensor that shares the memory of the file's pages; changes of it are not written to the file.

        Raises:
            OSError: the file cannot be opened. ValueError: it has become shorter.
        """
        entry = self.entries[name]
        dtype, offset = DTYPES[entry.dtype], self.start + entry.start
        if entry.stop == entry.start:
            return torch.empty(entry.shape, dtype=dtype)
        pages = self._map()
        if offset % dtype.itemsize:
            aligned = bytearray(pages[offset : self.start + entry.stop])
            return torch.frombuffer(aligned, dtype=dtype).reshape(entry.shape)
        count = (entry.stop - entry.start) // dtype.itemsize
        return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset).reshape(entry.shape)

    def release(self) -> None:
        """Releases the pages from memory; they are read again on use. Changes of tensors are lost."""
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)

    def _map(self) -> mmap.mmap:
        if self._pages is None:
            with open(self.path, "rb") as file:
                self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            budget = _BUDGET.get()
            if budget is not None:
                budget.files.append(self)
        return self._pages


class PageBudget:
    """Counts the bytes of files that were read, and releases the pages of all files when they are more than `RESIDENT`."""

    def __init__(self) -> None:
        self.files: list[MappedTensors] = []
        self.used = 0

    def spend(self, count: int) -> None:
        """Counts bytes."""
        self.used += count
        if self.used > RESIDENT:
            self.used = 0
            for file in self.files:
                file.release()


@contextlib.contextmanager
def release_pages() -> Iterator[None]:
    """Inside it, files that are read are in memory only in part. Their tensors must not be changed in place."""
    token = _BUDGET.set(PageBudget())
    try:
        yield
    finally:
        _BUDGET.reset(token)


def count_use(*tensors: Tensor) -> None:
    """Counts tensors that were read as a whole; inside `release_pages` this may release the pages of the files."""
    budget = _BUDGET.get()
    if budget is not None:
        budget.spend(sum(tensor.nbytes for tensor in tensors))
