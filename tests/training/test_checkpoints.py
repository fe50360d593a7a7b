"""Checkpoints are atomic, verified, pruned, and rejected by another run. Kills: see `test_resume`."""

import errno
import json
import os

import pytest
import torch

from tests.raising import raises, warns
from tests.training.resume_worker import trainer_of
from veneer import atomic_files
from veneer.atomic_files import write_atomically
from veneer.training.loop import checkpoints as module
from veneer.training.loop.checkpoints import CheckpointError, Checkpoints, CheckpointWarning, State, copy_into
from veneer.training.loop.trainer import TrainConfig


def state(step):
    tensors = {"weights": {"a": torch.full((3,), float(step)), "b": torch.arange(4, dtype=torch.int32)}}
    return State(step, tensors, {"note": [step, None, "x"]})


def same(found, step):
    expected, tensors = state(step), found.tensors["weights"]
    pairs = [(tensors[name], tensor) for name, tensor in expected.tensors["weights"].items()]
    equal = all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    return equal and found.step == step and found.values == expected.values


@pytest.fixture
def store(tmp_path):
    return Checkpoints(tmp_path / "run", {"learning_rate": 0.1, "method": {"name": "lora", "ranks": [4]}})


def full_disk(monkeypatch, after):
    """Writing fails after `after` files, as on a disk without space."""
    left, write = [after], module.write_synced

    def refuse(path, data):
        left[0] -= 1
        if left[0] < 0:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    for each in (module, atomic_files):
        monkeypatch.setattr(each, "write_synced", refuse)


def test_comes_back_as_it_was(store):
    store.save(state(7))
    assert same(store.newest(), 7)
    assert {path.name for path in store.path(7).iterdir()} == {"weights.safetensors", "state.json", "manifest.json"}


def test_none_in_an_empty_or_missing_folder(store):
    assert store.newest() is None


@pytest.mark.parametrize(("keep", "left"), [(1, [4]), (2, [3, 4]), (0, [1, 2, 3, 4])])
def test_keeps_the_newest(tmp_path, keep, left):
    store = Checkpoints(tmp_path, {}, keep)
    for step in (1, 2, 3, 4):
        store.save(state(step))
    assert store.steps() == left
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("after", [0, 1, 2])
def test_full_disk_keeps_the_old_one_and_leaves_nothing_half_written(store, monkeypatch, after):
    store.save(state(1))
    with monkeypatch.context() as patch:
        full_disk(patch, after)
        with raises(CheckpointError, file=store.folder, where="step 2", given=errno.ENOSPC) as caught:
            store.save(state(2))
        assert "checkpoint-000001" in str(caught.value)
    assert [path.name for path in store.folder.iterdir()] == ["checkpoint-000001"]
    assert same(store.newest(), 1)


def test_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
    """A warning is issued, and the next checkpoint is written."""
    trainer = trainer_of(tmp_path, TrainConfig(steps=4, checkpoint_every=2, tracker="none"), 0.0)
    with monkeypatch.context() as patch:
        full_disk(patch, 2)
        trainer.on_step = lambda event: patch.undo() if event.step == 3 else None
        with warns(CheckpointWarning, file=tmp_path, where="step 2", given=errno.ENOSPC):
            result = trainer.fit()
    assert result.steps == 4
    assert result.checkpoint == tmp_path / "checkpoint-000004"
    assert "step 2" in result.warnings[0]
    assert trainer.checkpoints.steps() == [4]


def test_leftovers_of_kills_are_cleaned(store):
    store.save(state(1))
    (store.folder / ".saving-000002-99").mkdir()
    (store.folder / ".saving-000002-99" / "weights.safetensors").write_bytes(b"half")
    (store.folder / ".deleting-checkpoint-000000-99").mkdir()
    (store.folder / ".saving-last_good.safetensors-99").write_bytes(b"half")
    assert store.steps() == [1]
    store.clean()
    assert [path.name for path in store.folder.iterdir()] == ["checkpoint-000001"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("damage", [flip, cut, os.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "manifest.json"])
def test_a_damaged_one_is_passed_over(store, name, damage):
    store.save(state(1))
    store.save(state(2))
    damage(store.path(2) / name)
    with warns(CheckpointWarning, file=store.path(2), given="damaged"):
        found = store.newest()
    assert same(found, 1)
    assert store.steps() == [1]
    assert (store.folder / "damaged-000002").is_dir()


def test_all_damaged_is_an_error(store):
    store.save(state(1))
    flip(store.path(1) / "weights.safetensors")
    with (
        warns(CheckpointWarning, file=store.path(1), given="damaged"),
        raises(CheckpointError, file=store.folder, given="damaged"),
    ):
        store.newest()


def test_different_settings_are_listed(store):
    store.save(state(1))
    other = Checkpoints(store.folder, {"learning_rate": 0.2, "method": {"name": "lora", "ranks": [4]}, "photos": ["ab"]})
    expected = {"learning_rate": 0.2, "photos": ["ab"]}
    with raises(CheckpointError, file=store.path(1), where="settings", given={"learning_rate": 0.1}, expected=expected):
        other.newest()
    assert same(other.newest(accept=("learning_rate", "photos")), 1)


def test_a_resumed_run_with_another_configuration_is_refused(tmp_path):
    config = TrainConfig(steps=2, checkpoint_every=1, tracker="none")
    trainer_of(tmp_path, config, 0.0).fit()
    with raises(CheckpointError, where="settings", given={"batch": 1}, expected={"batch": 2}):
        trainer_of(tmp_path, TrainConfig(steps=2, checkpoint_every=1, tracker="none", batch=2), 0.0).fit(resume=True)
    with raises(CheckpointError, file=tmp_path, where="steps", given=2):
        trainer_of(tmp_path, config, 0.0).fit()
    longer = trainer_of(tmp_path, TrainConfig(steps=3, checkpoint_every=3, tracker="none"), 0.0).fit(resume=True)
    assert (longer.resumed_from, longer.steps) == (2, 3)


def test_a_newer_format_asks_for_a_newer_veneer(store):
    store.save(state(1))
    path = store.path(1) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with raises(CheckpointError, file=store.path(1), where="format", given=99):
        store.newest()


def test_put_lists_mismatched_tensors_and_changes_nothing():
    there = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    given = {"missing": ["c"], "unused": ["d"], "misshapen": ["b"]}
    with raises(CheckpointError, where="weights", given=given):
        copy_into(there, {"a": torch.ones(2), "b": torch.ones(4), "d": torch.ones(1)}, "weights")
    assert not any(tensor.any() for tensor in there.values())


def test_atomic_file_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "last_good.safetensors"
    write_atomically(path, b"old")
    full_disk(monkeypatch, 0)
    with raises(OSError, errno=errno.ENOSPC):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
