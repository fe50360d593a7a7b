"""Initial weights from an adapter file of any format (`init_from`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer import adapter_merging
from veneer.formats import inspect, load_all, read
from veneer.formats.native import KEY
from veneer.injection import Attachment, LoadError, VeneerError
from veneer.injection.adapter_forms import SwappableAdapter
from veneer.injection.composition.swap import swap_state
from veneer.injection.method import Method

FREE = ("dropout", "init", "initialize", "tokens")
"""Options that may differ from those of the file: they do not change what trained weights compute."""
PAIR = ("down", "up")
"""Tensors whose rank can change."""


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter of a file, without the model.

    Args:
        method: its config. `sites`: names of its sites. `state`: tensors, as for `Attachment.load_state_dict`.
        note: how it was resized, or "".
    """

    method: Method
    sites: tuple[str, ...]
    state: dict[str, Tensor]
    note: str = ""


@dataclass(frozen=True)
class InitialAdapters:
    """The adapters of a file, read before those of the run are attached.

    Args:
        file: path of the file. `adapters`: its content.
    """

    file: Path
    adapters: tuple[InitialAdapter, ...]

    def load_into(self, attached: Sequence[Attachment]) -> list[str]:
        """Sets the weights of new attachments, so that they compute what the adapters of the file compute.

        Returns:
            Notes on adapters that were resized.
        Raises:
            LoadError: methods, sites, options or shapes differ; `given` has those of the file, `expected` those of the run.
        """
        given, expected = sorted(a.method.name for a in self.adapters), sorted(a.method.name for a in attached)
        if given != expected:
            names = "+".join(given)
            message = (
                f"{self.file}: has {names}; the run trains {'+'.join(expected)}. Train with --method {names}, or leave out "
                "--init-from."
            )
            raise LoadError(message, file=self.file, where="method", given=tuple(given), expected=tuple(expected))
        by_name = {each.method.name: each for each in self.adapters}
        for attachment in attached:
            self._load(by_name[attachment.method.name], attachment)
        return [each.note for each in self.adapters if each.note]

    def _load(self, initial: InitialAdapter, attachment: Attachment) -> None:
        self._check_sites(initial, attachment)
        before = {key: tensor.detach().clone() for key, tensor in attachment.state_dict().items()}
        adapters: list[Any] = [adapter for _, adapter in attachment.parts.values()]
        resized = [key for key, tensor in initial.state.items() if key in before and before[key].shape != tensor.shape]
        try:
            if all(isinstance(adapter, SwappableAdapter) for adapter in adapters):
                self._check_resizable(resized, initial, before)
                swap_state(attachment, initial.method, initial.sites, initial.state)
                _restore_spare_rank(attachment, initial.state, before)
            else:
                self._check_options(initial, attachment)
                attachment.load_state_dict(initial.state)
        except VeneerError as error:
            if isinstance(error, LoadError) and error.file:
                raise
            name = initial.method.name
            message = f"{self.file}: {error} Train with the options of {name} in the file, or leave out --init-from."
            raise LoadError.from_error(error, message, file=self.file) from error

    def _check_sites(self, initial: InitialAdapter, attachment: Attachment) -> None:
        missing, unknown = ({*a} - {*b} for a, b in ((attachment.parts, initial.sites), (initial.sites, attachment.parts)))
        if missing or unknown:
            name = initial.method.name
            parts = [
                f"{len(names)} {where}, such as {min(names)}"
                for names, where in ((unknown, "only in the file"), (missing, "only in the run"))
                if names
            ]
            message = (
                f"{self.file}: {name} adapts other sites than the run: {'; '.join(parts)}. Select the sites of the file with "
                "--where."
            )
            raise LoadError(message, file=self.file, where="sites", given=tuple(sorted(unknown)), expected=tuple(sorted(missing)))

    def _check_resizable(self, keys: Sequence[str], initial: InitialAdapter, before: Mapping[str, Tensor]) -> None:
        fixed = [key for key in keys if key.rpartition(":")[2] not in PAIR]
        if fixed:
            key, name = fixed[0], initial.method.name
            given, expected = tuple(initial.state[key].shape), tuple(before[key].shape)
            message = (
                f"{self.file}: {key} has shape {given}; expected {expected}. A {name} cannot be resized: train with the "
                "options of the file."
            )
            raise LoadError(message, file=self.file, where=key, given=given, expected=expected)

    def _check_options(self, initial: InitialAdapter, attachment: Attachment) -> None:
        there, here = initial.method.config(), attachment.method.config()
        differing = [key for key in {**there, **here} if key not in FREE and there.get(key) != here.get(key)]
        if differing:
            given, expected = ({key: options.get(key) for key in differing} for options in (there, here))
            message = (
                f"{self.file}: {initial.method.name} has {given}; the run has {expected}. Train with the options of the file."
            )
            raise LoadError(message, file=self.file, where="options", given=given, expected=expected)


def read_initial(model: Any, path: Path, methods: Sequence[Method]) -> InitialAdapters:
    """Reads the adapters of a file on the model of a run, which is unchanged afterwards.

    A LoRA of a higher rank than that of the run is reduced to it: the largest singular values of each weight update are kept.

    Args:
        methods: configs of the methods that will be attached.
    Raises:
        LoadError: the file cannot be read, or was made for another base model.
    """
    ranks = {m.name: m for m in methods}
    loaded = load_all(model, path)
    adapters = []
    try:
        with torch.random.fork_rng(devices=[]):
            for index, attachment in enumerate(loaded):
                loaded[index], note = _reduced(model, attachment, ranks.get(attachment.method.name))
                each = loaded[index]
                state = {key: tensor.detach().clone() for key, tensor in each.state_dict().items()}
                adapters.append(InitialAdapter(each.method, tuple(each.parts), state, note))
    finally:
        for attachment in reversed(loaded):
            attachment.detach()
    return InitialAdapters(Path(path), tuple(adapters))


def _reduced(model: Any, attachment: Attachment, method: Method | None) -> tuple[Attachment, str]:
    """The attachment, or a LoRA of the rank of `method` in its place, and a note on it."""
    if attachment.method.name != "lora" or method is None:
        return attachment, ""
    pairs = [(_rank(attachment.method, site), _rank(method, site)) for site, _ in attachment.parts.values()]
    if all(there <= here for there, here in pairs):
        return attachment, ""
    rank = max(here for _, here in pairs)
    result = adapter_merging.resize(model, attachment, rank)
    note = f"lora: reduced from rank {max(there for there, _ in pairs)} to {rank}, relative error {result.error:.2e}"
    return result.attachment, note


def _rank(method: Method, site: Any) -> int:
    return int(getattr(method.at(site), "rank", 0))


@torch.no_grad()
def _restore_spare_rank(attachment: Attachment, state: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Random initial values for the rows of `down` beyond the rank of the file.

    `up` is 0 there, so that the weight update is unchanged; with both 0, neither would get a gradient.
    """
    for name, (site, adapter) in attachment.parts.items():
        down = getattr(adapter, "down", None)
        key = f"{name}:down"
        if down is None or key not in state or getattr(adapter, "pairs", 1) != 1:
            continue
        axis = 1 if getattr(site, "kind", "") == "embedding" else 0
        rank = state[key].shape[axis]
        if rank < down.shape[axis]:
            spare = slice(rank, None) if axis == 0 else (slice(None), slice(rank, None))
            down[spare] = before[key][spare].to(down)


def file_digest(path: str | Path) -> str:
    """SHA-256 of an adapter file, or of the file in a run's folder."""
    return hashlib.sha256(read(path).path.read_bytes()).hexdigest()


def trigger_words(path: Path | None, concept: str, class_word: str) -> dict[str, str]:
    """Trigger token (`concept`) and class word of a run; where one is empty, that of its initial adapter.

    Args:
        path: adapter file, or None.
    Raises:
        LoadError: it is not a complete safetensors file.
    """
    in_file = ("", "") if path is None or (concept and class_word) else _trigger_of(path)
    return {"concept": concept or in_file[0], "class_word": class_word or in_file[1]}


def _trigger_of(path: Path) -> tuple[str, str]:
    """Trigger token of an adapter file, and its class word; "" if the file has none."""
    file = read(path)
    provenance = file.json(KEY).get("provenance", {}) if KEY in file.metadata else {}
    concept, word = (str(provenance.get(key) or "") for key in ("concept", "class_word"))
    return concept or next(iter(inspect(path).words), ""), word
