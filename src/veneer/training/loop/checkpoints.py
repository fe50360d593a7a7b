"""Crash-safe checkpoints: safetensors, JSON and a manifest with checksums, renamed into place.

`checkpoint-000120/` has one safetensors file per kind of tensor, `state.json` for other values, and `manifest.json` with the size
and SHA-256 of each file. It is written under a temporary name, synced and renamed. A folder that does not match its manifest is
skipped, and the previous checkpoint is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from veneer.atomic_files import sync_folder, write_synced
from veneer.injection.errors import VeneerError, VeneerWarning

FORMAT = 1
_TEMPORARY = (".saving-", ".deleting-", ".reserve")


class CheckpointError(VeneerError):
    """A checkpoint that cannot be written, cannot be read, or belongs to another run."""


class CheckpointWarning(VeneerWarning):
    """A checkpoint was skipped or could not be written; training continues."""


class _Damaged(Exception):
    """A checkpoint whose files differ from its manifest."""


@dataclass
class State:
    """Content of a checkpoint: number of updates, tensors by file and name, and JSON values."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
        folder: folder of the run, created with the first checkpoint.
        identity: settings that must match on resume, as JSON values.
        keep: number of newest checkpoints to keep; older ones are deleted after each save; 0 keeps all.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` updates."""
        return self.folder / f"checkpoint-{step:06d}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first, intact or not."""
        found = (path.name.removeprefix("checkpoint-") for path in self.folder.glob("checkpoint-*") if path.is_dir())
        return sorted(int(number) for number in found if number.isdecimal())

    def clean(self) -> None:
        """Deletes leftovers of interrupted saves and deletions."""
        for path in [path for prefix in _TEMPORARY for path in self.folder.glob(f"{prefix}*")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Deletes all checkpoints, for a run that starts over in the same folder."""
        self.clean()
        for step in self.steps():
            self._delete(self.path(step))

    def save(self, state: State) -> Path:
        """Writes a checkpoint, then deletes the oldest beyond `keep`.

        Raises:
            CheckpointError: writing failed, for example on a full disk. Earlier checkpoints are unchanged, and incomplete files
                are deleted.
        """
        temporary = self.folder / f".saving-{state.step:06d}-{os.getpid()}"
        try:
            self._write(temporary, state)
            target = self.path(state.step)
            if target.exists():  # a corrupt one that was skipped, or a leftover of another run
                self._delete(target)
            os.rename(temporary, target)
            sync_folder(self.folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise self._failed(state.step, error) from error
            raise
        for step in self.steps()[: -self.keep] if self.keep else []:
            self._delete(self.path(step))
        return target

    def _failed(self, step: int, error: OSError) -> CheckpointError:
        newest = self.steps()
        kept = f"the newest on disk is {self.path(newest[-1]).name}" if newest else "the folder has no checkpoints yet"
        why = error.strerror or error
        message = f"the checkpoint of step {step} could not be written ({why}); {kept}. Free space or choose another folder."
        return CheckpointError(message, file=self.folder, where=f"step {step}", given=error.errno)

    def _write(self, folder: Path, state: State) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        contents = {f"{kind}.safetensors": to_bytes(tensors) for kind, tensors in state.tensors.items()}
        document = {"step": state.step, "identity": self.identity, "values": state.values}
        contents["state.json"] = json.dumps(document, indent=1, sort_keys=True).encode()
        files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
        manifest = {"format": FORMAT, "step": state.step, "run": self._digest(), "torch": torch.__version__, "files": files}
        contents["manifest.json"] = json.dumps(manifest, indent=1, sort_keys=True).encode()
        for name, data in contents.items():
            write_synced(folder / name, data)
        sync_folder(folder)

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def _delete(self, path: Path) -> None:
        """Deletes a checkpoint; an interrupted deletion leaves no folder with the name of a checkpoint."""
        aside = path.with_name(f".deleting-{path.name}-{os.getpid()}")
        try:
            os.rename(path, aside)
        except OSError as error:
            message = f"{path} could not be deleted ({error})"
            warnings.warn(CheckpointWarning(message, file=path, given=error.errno), stacklevel=3)
        shutil.rmtree(aside, ignore_errors=True)

    def newest(self, accept: Collection[str] = ()) -> State | None:
        """Reads the newest intact checkpoint; None if the folder has no checkpoints.

        Corrupt ones are skipped with a warning and renamed to `damaged-…`.

        Args:
            accept: fields of `identity` that may differ from the checkpoint's.

        Raises:
            CheckpointError: it belongs to another run or a newer version of veneer, or all checkpoints are corrupt.
        """
        reasons: list[str] = []
        for step in reversed(self.steps()):
            try:
                state = self.read(step, accept)
            except _Damaged as damage:
                reasons.append(f"{self.path(step)} is damaged ({damage})")
                message = f"{reasons[-1]}; trying the previous one"
                warnings.warn(CheckpointWarning(message, file=self.path(step), given="damaged"), stacklevel=2)
                continue
            for later in [other for other in self.steps() if other > step]:
                self._put_aside(self.path(later))
            return state
        if reasons:
            raise CheckpointError(
                f"no checkpoint in {self.folder} is usable: {'; '.join(reasons)}. Start over without --resume.",
                file=self.folder,
                given="damaged",
            )
        return None

    def _put_aside(self, path: Path) -> None:
        aside = path.with_name(path.name.replace("checkpoint-", "damaged-"))
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)

    def read(self, step: int, accept: Collection[str] = ()) -> State:
        """Reads and verifies the checkpoint of one step; see `newest` for the errors."""
        folder = self.path(step)
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            written_by = int(manifest["format"])
            if written_by > FORMAT:
                message = (
                    f"{folder} has format {written_by}; this version of veneer supports up to {FORMAT}: install a newer version"
                )
                raise CheckpointError(message, file=folder, where="format", given=written_by, expected=FORMAT)
            contents = {name: _verified(folder / name, facts) for name, facts in manifest["files"].items()}
            document = json.loads(contents.pop("state.json"))
            tensors = {name.removesuffix(".safetensors"): safetensors.torch.load(data) for name, data in contents.items()}
            saved, values = document["identity"], document["values"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise _Damaged(f"{type(error).__name__}: {error}") from error
        self._compare(folder, saved, accept)
        return State(step, tensors, values)

    def _compare(self, folder: Path, saved: Mapping[str, Any], accept: Collection[str]) -> None:
        missing = object()
        names = [name for name in sorted({*saved, *self.identity}) if name not in accept]
        differing = [name for name in names if saved.get(name, missing) != self.identity.get(name, missing)]
        if differing:
            lines = [
                f"{name}: {saved.get(name, 'absent')!r} in the checkpoint, {self.identity.get(name, 'absent')!r} now"
                for name in differing
            ]
            raise CheckpointError(
                f"{folder} was written with other settings: {'; '.join(lines)}. Resume with the same settings, accept the change "
                "by name, or choose another folder.",
                file=folder,
                where="settings",
                given={name: saved[name] for name in differing if name in saved},
                expected={name: self.identity[name] for name in differing if name in self.identity},
            )


def _verified(path: Path, facts: Mapping[str, Any]) -> bytes:
    data = path.read_bytes()
    if len(data) != facts["bytes"]:
        raise ValueError(f"{path.name} has {len(data)} bytes, the manifest says {facts['bytes']}")
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise ValueError(f"{path.name} does not match its SHA-256")
    return data


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor], kind: str) -> None:
    """Copies `saved` into `tensors`, or raises without any change.

    Raises:
        CheckpointError: a name, shape or dtype differs; the message lists them.
    """
    missing, unused = sorted(set(tensors) - set(saved)), sorted(set(saved) - set(tensors))
    wrong = [name for name in tensors if name in saved and _kind(saved[name]) != _kind(tensors[name])]
    names = {"missing": missing, "unused": unused, "of another shape or dtype": wrong}
    faults = [f"{len(each)} {word} ({', '.join(each[:5])})" for word, each in names.items() if each]
    if faults:
        given = {"missing": missing, "unused": unused, "misshapen": wrong}
        raise CheckpointError(
            f"the {kind} in the checkpoint do not match this model: {'; '.join(faults)}", where=kind, given=given
        )
    for name, tensor in tensors.items():
        tensor.copy_(saved[name])


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of `tensors`, from copies, so that views and shared storage are supported."""
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies)
