"""WebDataset shards: samples, captions, and archives that are damaged or hostile."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.raising import raises, warns
from tests.training.images import gradient
from veneer.training.data.image_io import DataError, DataWarning, PhotoLimits
from veneer.training.data.photo_folder import find_photos
from veneer.training.data.run_photos import read_photos
from veneer.training.data.tar_shards import extract_shards, shards_of
from veneer.training.personalization_config import PersonalizeConfig


def png(seed: int) -> bytes:
    data = io.BytesIO()
    gradient(40, 32, seed).save(data, "PNG")
    return data.getvalue()


def shard(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tar file; a text as content is the target of a link."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def captions(folder: Path) -> list[str | None]:
    return [photo.caption for photo in find_photos(folder)]


def test_samples_of_shards_become_photos_with_captions(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shard(
        data / "a.tar", ("x/1.png", png(1)), ("x/1.txt", b"a\n toy"), ("x/2.json", b'{"caption": "two"}'), ("x/2.png", png(2)),
        ("y/2.png", png(3)),
    )  # fmt: skip
    shard(data / "b.tar", ("1.v1.png", png(9)), ("1.png", png(4)), ("1.json", json.dumps({"text": "four"}).encode()))
    with warns(DataWarning, given=(".v1.png",)):
        folder = extract_shards(shards_of(data), tmp_path / "out")
    photos = find_photos(folder)
    assert captions(folder) == ["a toy", "two", None, "four"]
    assert [photo.path.read_bytes() for photo in photos] == [png(1), png(2), png(3), png(4)]
    times = [photo.path.stat().st_mtime_ns for photo in photos]
    with warns(DataWarning, given=(".v1.png",)):
        extract_shards(shards_of(data), tmp_path / "out")
    assert [photo.path.stat().st_mtime_ns for photo in photos] == times, "written once"


def test_names_of_members_are_not_used_as_paths(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    file = shard(
        tmp_path / "a.tar", ("../outside.png", png(1)), (str(tmp_path / "absolute.png"), png(2)), ("link.txt", str(secret)),
        ("link.png", png(3)),
    )  # fmt: skip
    with warns(DataWarning, given=("link.txt",)):
        folder = extract_shards([file], tmp_path / "deep" / "out")
    assert not outside.exists()
    assert not (tmp_path / "absolute.png").exists()
    assert len(find_photos(folder)) == 3
    assert captions(folder) == [None] * 3
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "deep", "secret.txt"}


@pytest.mark.parametrize(
    ("members", "data"),
    [
        ([("1.txt", b"a")], {"given": ("a.tar",)}),
        ([("1.png", b"x" * 101)], {"where": "1.png", "given": 101, "expected": 100}),
        ([("1.txt", b"\xff\xfe\xff")], {"where": "/1", "given": ".txt"}),
        ([("1.json", b"{")], {"where": "/1", "given": ".json"}),
        ([("1.png", b"x"), ("1.jpg", b"y")], {"where": "/1", "expected": 1}),
    ],
)
def test_invalid_shards_are_errors(tmp_path: Path, members: Any, data: dict[str, Any]) -> None:
    file = shard(tmp_path / "a.tar", *members)
    with raises(DataError, file=file, **data):
        extract_shards([file], tmp_path / "out", PhotoLimits(max_bytes=100))


@pytest.mark.parametrize("content", [b"not a tar file" * 100, b""])
def test_files_that_are_no_tar_are_errors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError) as caught:
        extract_shards([tmp_path / "a.tar"], tmp_path / "out")
    assert str(caught.value.file) == str(tmp_path / "a.tar")


def test_a_truncated_shard_is_an_error(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", ("1.png", png(1)), ("2.png", png(2)))
    file.write_bytes(file.read_bytes()[: 512 + 200])
    with raises(DataError, file=file, given="damaged"):
        extract_shards([file], tmp_path / "out")


def test_folders_with_other_files_are_no_shards(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", ("1.png", png(1)))
    assert shards_of(tmp_path) == [tmp_path / "a.tar"] == shards_of(tmp_path / "a.tar")
    (tmp_path / "b.png").write_bytes(png(2))
    assert shards_of(tmp_path) == []
    assert shards_of(tmp_path / "missing") == []


def test_a_dataset_of_shards_is_read_into_the_folder_of_the_run(tmp_path: Path) -> None:
    file = shard(tmp_path / "a.tar", ("1.png", png(1)), ("1.txt", b"a <toy>"), ("2.png", png(2)))
    run = PersonalizeConfig(datasets=({"path": str(file), "concept": "<toy>"},), template=("my {concept}",))
    photos = read_photos(run, shards=tmp_path / "shards").photos
    assert [photo.caption for photo in photos] == ["a <toy>", None]
    assert all(photo.path.is_relative_to(tmp_path / "shards") for photo in photos)
