"""Safe names and isolated users."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest
from filelock import FileLock
from veneer.apps import jobs
from veneer.apps.limits import LIMITS
from veneer.apps.workspace import Workspace, check_text, printable, safe_name

from tests.raising import raises
from veneer.injection.errors import OptionError, UnknownName

EVIL = [
    "", ".", "..", "../..", "/etc/passwd", "C:\\x", "a/../../b", "..\\..\\b", "nul\0l", "a\nb", "-rf", "--out=x", "~", "$(id)",
    "`id`",
    "a;b", "%2e%2e%2f", "‮gnp.exe", "𝕏" * 400, "猫" * 400, "x" * 5000 + ".safetensors", "CON", "con.png", "aux.", "COM¹", "．．／",
    "e\u0301" * 300, "\ud800", " .hidden", "...", "a.", "a ", ".png", "😀",
]  # fmt: skip

DEVICE = re.compile(r"(?i)(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*([.:].*)?")
"""What is no file on Windows."""


@pytest.mark.parametrize("name", EVIL)
def test_safe_name_is_a_file_in_its_folder(tmp_path: Path, name: str) -> None:
    found = safe_name(name)
    assert (tmp_path / found).parent == tmp_path
    assert (tmp_path / found).resolve() == tmp_path / found
    assert len(found) <= 82
    assert len(found.encode()) <= 162
    assert not found.startswith((".", "-"))
    assert not found.endswith((".", " "))
    assert all(c in "._-" or unicodedata.category(c)[0] in "LMN" for c in found)
    assert not DEVICE.fullmatch(found)
    (tmp_path / found).write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == [unicodedata.normalize("NFC", found)]
    assert safe_name(found) == found, "it is at rest"


def test_names_of_any_script_stay_distinct() -> None:
    names = ["猫", "犬", "กิน", "กัน", "кот", "קוט", "ñ", "n", "😀", "😁", "+", "++"]
    assert len({safe_name(name) for name in names}) == len(names)
    assert safe_name("e\u0301") == safe_name("é"), "however a system writes it"
    assert safe_name("my photo.JPG") == "my-photo.JPG"
    assert safe_name("x" * 500 + ".safetensors").endswith("x.safetensors")
    assert (safe_name("", "adapter"), safe_name("..", "adapter")) == ("adapter", "adapter")


def test_users_are_isolated(tmp_path: Path) -> None:
    names = [None, "local", "anna", "Anna", "../anna", "anna/../bob", "bob", "user-", "", "x" * 1000, "jobs", "*"]
    spaces = [Workspace(tmp_path, name) for name in names]
    assert len({space.folder for space in spaces}) == len(names)
    for space in spaces:
        assert space.folder.parent == tmp_path
        assert space.folder.resolve() == space.folder
    made = {space: jobs.create_job(space.jobs, "train", "<b>mine</b>", ["personalize"]) for space in spaces}
    for space in spaces:
        space.adapters.mkdir()
        (space.adapters / "a.safetensors").write_bytes(b"x")
        made[space].run.mkdir()
        (made[space].run / "adapter.safetensors").write_bytes(b"x")
    for space in spaces:
        assert space.all_jobs() == [made[space]]
        assert space.count_active() == 1
        assert all(path.is_relative_to(space.folder) for path in space.all_adapters().values())
        for other in spaces:
            if other is not space:
                for name in (made[other].name, f"../../{other.folder.name}/jobs/{made[other].name}", str(made[other].folder)):
                    with raises(UnknownName, name=name, kind="job"):
                        space.job(name)
                    with raises(UnknownName, kind="adapter"):
                        space.adapter(f"../../{other.folder.name}/adapters/a")
        for name in ("", ".", "..", "*", "../jobs", "a\0"):
            with raises(UnknownName, name=name, kind="job"):
                space.job(name)


def test_adapter_names_of_jobs_are_stable(tmp_path: Path) -> None:
    """By title and time; a later job of the same minute gets a suffix."""
    space = Workspace(tmp_path)
    trained = []
    for title in ("<toy>, lora", "<toy>, lora", "<cat>, lora"):
        trained.append(jobs.create_job(space.jobs, "train", title, ["personalize"]))
        trained[-1].run.mkdir()
    when, made = trained[0].created, trained[0].metadata
    for number, job in enumerate(trained):  # in one minute, whenever the test runs
        jobs.write_json(job.folder / "job.json", {**job.metadata, "made": made["made"] + number / 1000})
    files = [job.run / "adapter.safetensors" for job in trained]
    later = f"<toy>, lora · {when} ({trained[1].name[-8:]})"
    files[1].write_bytes(b"x")
    assert space.all_adapters() == {later: files[1]}
    files[2].write_bytes(b"x")
    files[0].write_bytes(b"x")
    assert [*space.all_adapters().items()] == [
        (f"<cat>, lora · {when}", files[2]), (later, files[1]), (f"<toy>, lora · {when}", files[0]),
    ]  # fmt: skip


def test_count_of_unfinished_jobs(tmp_path: Path) -> None:
    space = Workspace(tmp_path)
    runs, _, stopped = (jobs.create_job(space.jobs, "train", "a toy", ["personalize"]) for _ in range(3))
    stopped.stop()
    with FileLock(runs.folder / "lock"):
        assert runs.state == "running"
        assert space.count_active() == 2


def test_text_is_limited() -> None:
    assert check_text("x" * LIMITS.text, "prompt") == "x" * LIMITS.text
    assert check_text(" two\r\nlines\tof 猫 ", "prompt") == "two\nlines\tof 猫"
    with raises(OptionError, option="prompt", given=LIMITS.text + 1, expected=LIMITS.text):
        check_text("x" * (LIMITS.text + 1), "prompt")
    for wrong in ("a\0b", "a\x1b[31m", "a\x7f", "a\x85", "\ud800"):
        with raises(OptionError, option="prompt", expected="plain text"):
            check_text(wrong, "prompt")
    assert printable("a\nb\u202e" + "x" * 100) == "a?b?" + "x" * 53 + "…"
    assert len(printable("x" * 10_000)) <= 60
