"""Full disks: the reserve, intact files, and error messages."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.training.test_checkpoints import full_disk, trainer_of
from veneer.injection import SaveError
from veneer.training.loop.checkpoints import CheckpointWarning
from veneer.training.loop.config import TrainConfig
from veneer.training.loop.disk_space import DiskFull, Reserve, free_bytes, is_full, optional, writing


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/srv/secret/place")


def test_a_reserve_takes_real_blocks_and_gives_them_back(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "run", 3 * 2**20 + 5)
    assert reserve.take()
    assert reserve.path.stat().st_blocks * 512 >= 3 * 2**20
    reserve.release()
    reserve.release()
    assert not list((tmp_path / "run").iterdir())


def test_a_reserve_without_space_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.training.loop.disk_space._allocate", no_space)
    with pytest.warns(CheckpointWarning):
        assert not Reserve(tmp_path, 100).take()


def test_only_a_full_disk_is_one(tmp_path: Path) -> None:
    assert is_full(OSError(errno.ENOSPC, ""))
    wrapped = SaveError("no")
    wrapped.__cause__ = OSError(errno.EDQUOT, "")
    assert is_full(wrapped)
    assert not is_full(OSError(errno.EACCES, ""))
    with pytest.raises(PermissionError), writing(tmp_path, "a"):
        raise PermissionError(errno.EACCES, "")


def test_the_error_lists_intact_files_without_paths(tmp_path: Path) -> None:
    for name in ("checkpoint-000002", "checkpoint-000004"):
        (tmp_path / name).mkdir()
    with pytest.raises(DiskFull) as caught, writing(tmp_path, "adapter.safetensors"):
        no_space()
    assert (caught.value.file, caught.value.kept) == ("adapter.safetensors", ("checkpoint-000004",))
    assert "--resume" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert "/srv/secret" not in str(caught.value)
    notes: list[str] = []
    assert optional(tmp_path, "grid.png", no_space, notes) is None
    assert len(notes) == 1
    assert "grid.png" in notes[0]


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free_bytes(tmp_path), rel=0.1)
    assert free_bytes(None) is None


def test_checkpoints_and_weights_of_a_resumed_run_count_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.training.loop.disk_space.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    for name, size in (("adapter.safetensors", 1), ("checkpoint-000004/state.safetensors", 20), ("photo.png", 300)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert free_bytes(tmp_path) == 1021


def test_the_last_checkpoint_uses_the_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full until the reserve is released: a run stopped then can resume."""
    trainer = trainer_of(tmp_path, TrainConfig(steps=4, checkpoint_every=0, tracker="none"), 0.0)
    reserve = trainer._reserve
    assert reserve is not None
    release = reserve.release
    with monkeypatch.context() as patch:
        monkeypatch.setattr(reserve, "release", lambda: (patch.undo(), release()))
        trainer.on_step = lambda event: (full_disk(patch, 0), trainer.stop()) if event.step == 2 else None
        result = trainer.fit()
    assert result.stopped
    assert trainer.checkpoints is not None
    assert trainer.checkpoints.steps() == [result.steps]
    assert not reserve.path.exists()


def test_previews_and_progress_that_do_not_fit_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, TrainConfig(steps=4, preview_every=2, tracker="none"), 0.0)
    trainer.on_preview = no_space
    with pytest.warns(CheckpointWarning):
        result = trainer.fit()
    assert result.steps == 4
    assert len(result.warnings) == 2
    assert "/srv/secret" not in " ".join(result.warnings)
