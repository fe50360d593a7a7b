"""Tensors read from the pages of a file and written one by one, against the library of safetensors."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tests.raising import raises
from veneer.formats import read
from veneer.formats._io import mapped_tensors
from veneer.formats._io.mapped_tensors import DTYPES, count_use, release_pages
from veneer.formats._io.writer import write
from veneer.injection import LoadError, SaveError


def every_dtype() -> dict[str, Tensor]:
    """Three tensors of each dtype, in an order that is not that of the file: a matrix, a scalar and an empty one."""
    tensors = {}
    for i, dtype in enumerate(DTYPES.values()):
        values = torch.arange(6).reshape(2, 3)
        tensors |= {f"{i}.b": values.to(dtype), f"{i}.a": torch.tensor(1).to(dtype), f"{i}.c": torch.zeros(0, 3).to(dtype)}
    return tensors


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.double(), other.double())


def test_every_dtype_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    save_file(every_dtype(), tmp_path / "a.safetensors")
    mapped = read(tmp_path / "a.safetensors").mapped
    assert mapped is not None
    expected = load_file(tmp_path / "a.safetensors")
    assert all(same(mapped.tensor(name), tensor) for name, tensor in expected.items())
    assert len(expected) == 3 * len(DTYPES)


def test_tensors_at_odd_addresses_are_read(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 - len(header) % 2)
    assert (8 + len(header)) % 2
    values = torch.tensor([1.5, -2.0])
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    tensor = read(tmp_path / "a.safetensors").tensors()["x"]
    assert torch.equal(tensor, values)
    assert tensor.data_ptr() % 4 == 0


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(10_000)}, path)
    file = read(path)
    path.write_bytes(path.read_bytes()[:1000])
    with raises(LoadError, file=path):
        file.tensors()


@pytest.mark.parametrize("inside", [True, False])
def test_pages_are_released_inside_the_context_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    """A change of a tensor, which is not in the file, is lost with its page."""
    monkeypatch.setattr(mapped_tensors, "RESIDENT", 1000)
    save_file({"x": torch.ones(100)}, tmp_path / "a.safetensors")

    def changed(file: mapped_tensors.MappedTensors | None) -> Tensor:
        assert file is not None
        tensor = file.tensor("x").fill_(5)
        count_use(tensor)
        assert tensor[0] == 5  # 400 bytes were read
        count_use(tensor, tensor)
        return tensor

    file = read(tmp_path / "a.safetensors")
    if inside:
        with release_pages():
            assert changed(file.mapped)[0] == 1
    else:
        assert changed(file.mapped)[0] == 5


def test_a_file_is_laid_out_as_the_library_does(tmp_path: Path) -> None:
    tensors = every_dtype()
    data = write(tmp_path / "a.safetensors", tensors, {}).read_bytes()
    theirs = save(tensors, {})
    headers = [json.loads(d[8 : 8 + int.from_bytes(d[:8], "little")]) for d in (data, theirs)]
    for header in headers:
        header.pop("__metadata__", None)
    assert list(headers[0].items()) == list(headers[1].items())
    ends = [d[8 + int.from_bytes(d[:8], "little") :] for d in (data, theirs)]
    assert ends[0] == ends[1]
    assert int.from_bytes(data[:8], "little") % 8 == 0


class Computed(Mapping[str, Tensor]):
    """Tensors that are computed when they are read; counts how many exist at once."""

    def __init__(self) -> None:
        self.names = [f"t{i}" for i in range(20)]
        self.alive: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.full((1000,), float(name[1:]))
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(tensor)]
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_tensors_are_written_one_by_one(tmp_path: Path) -> None:
    tensors = Computed()
    written = load_file(write(tmp_path / "a.safetensors", tensors, {}))
    assert all(torch.equal(written[name], torch.full((1000,), float(name[1:]))) for name in tensors.names)
    assert tensors.most <= 2


def test_views_and_transposes_are_written_in_full(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"columns": whole[:, 1:3], "transpose": whole.T, "again": whole}
    written = load_file(write(tmp_path / "a.safetensors", tensors, {}))
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_a_dtype_that_adapter_files_do_not_have_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"before")
    with raises(SaveError, where="x", given=torch.complex64, expected=tuple(DTYPES.values())):
        write(tmp_path / "a.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)}, {})
    assert (tmp_path / "a.safetensors").read_bytes() == b"before"
