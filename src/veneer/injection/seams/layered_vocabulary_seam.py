"""The seam of token embeddings that differ between the cross-attention layers of a denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import LayeredVocabularyAdapter
from ..attention_sites import TextReaders
from ..errors import UnsupportedSite
from ..method import Adapter
from ..sites import VocabularySite
from .adapter_calls import blend, cast, is_tracing
from .sequence_seams import VocabularySeam


@dataclass(frozen=True)
class EncodedRows:
    """The rows that a text encoder encodes for a batch of prompts: one per prompt, or one per layer if a prompt has new tokens.

    Args:
        prompt, layer: (rows,) the prompt and the layer of each row. `index`: (layers, prompts) the row of each layer and prompt.
    """

    prompt: Tensor
    layer: Tensor
    index: Tensor


def encoded_rows(is_layered: Tensor, layers: int) -> EncodedRows:
    """The rows of a batch, in the order of its prompts. `is_layered`: (prompts,) True for one row per layer.

    On an accelerator, whose values a forward pass does not read, and in traced graphs all prompts have one row per layer.
    """
    each, prompts = _numbers(layers, is_layered), _numbers(len(is_layered), is_layered)
    if is_tracing() or is_layered.device.type != "cpu":
        rows = prompts[:, None].expand(-1, layers).flatten()
        return EncodedRows(rows, each.repeat(len(prompts)), each[:, None] + layers * prompts)
    counts = torch.where(is_layered, layers, 1)
    first = counts.cumsum(0) - counts
    prompt = prompts.repeat_interleave(counts)
    return EncodedRows(prompt, _numbers(len(prompt), prompt) - first[prompt], first + each[:, None] * is_layered)


def _numbers(count: int, like: Tensor) -> Tensor:
    """0, 1, … (count,) on the device of a tensor."""
    return like.new_ones(count, dtype=torch.long).cumsum(0) - 1


@dataclass
class ReaderHandles:
    """Handles of the hooks on the modules of another tower. A copy of the seam has none: that tower is not copied with it."""

    handles: list[RemovableHandle] = field(default_factory=list)

    def __deepcopy__(self, memo: Any) -> ReaderHandles:
        return ReaderHandles()


class LayeredVocabularySeam(VocabularySeam):
    """Trained embeddings of new token ids, which differ between the L cross-attention layers that read the text.

    A prompt with new ids is encoded once for each layer, in one batch; other prompts once, see `encoded_rows`. The text states
    of all layers leave the tower side by side, (batch, tokens, L·width), so that a pipeline repeats and concatenates them as any
    text states, and a hook on each cross-attention module takes its own. A pooled output is the mean over the layers, and so are
    the states that other modules read. Seams of several attachments share the rows. Enabling changes the shape of the output,
    and recompiles a compiled graph.
    """

    adapters: Sequence[LayeredVocabularyAdapter]  # type: ignore[assignment]

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[VocabularySite, Adapter]]) -> None:
        super().__init__(tower, parts)
        self.__dict__.update(_group=[], _readers=ReaderHandles(), _rows=None)

    @property
    def layers(self) -> int:
        """L, the number of cross-attention layers."""
        return self.adapters[0].layers

    def is_disabled(self) -> bool:
        """True at strength 0, also in a traced graph, because the output has another shape."""
        return self.idle

    def hooks(self) -> list[RemovableHandle]:
        site: VocabularySite = self.sites[0]
        root = self.module(site.ids.path)
        self._join_group(root)
        readers: TextReaders = site.readers
        self.__dict__["_readers"] = ReaderHandles(readers.register(self.layers))
        expand = root.register_forward_pre_hook(self._expand, with_kwargs=True, prepend=True)  # before ids are replaced
        return [expand, *super().hooks(), root.register_forward_hook(self._fold)]

    def _join_group(self, root: nn.Module) -> None:
        """Shares the list of the seams of this kind on the tower, in the order of attaching."""
        others = [getattr(hook, "__self__", None) for hook in root._forward_pre_hooks.values()]
        seams = [other for other in others if isinstance(other, LayeredVocabularySeam)]
        group: list[LayeredVocabularySeam] = seams[0].__dict__["_group"] if seams else []
        if group and group[0].layers != self.layers:
            name, expected = self.sites[0].name, group[0].layers
            message = (
                f"{name}: {self.layers} layers, but tokens of {expected} are attached. Use layers={expected}, or detach them."
            )
            raise UnsupportedSite(message, site=name, option="layers", given=self.layers, expected=expected)
        group.append(self)
        self.__dict__["_group"] = group

    def uninstall(self) -> None:
        group, readers = self.__dict__["_group"], self.__dict__["_readers"]
        group[:] = [seam for seam in group if seam is not self]
        self.__dict__.update(_group=[], _readers=ReaderHandles(), _rows=None)
        for handle in readers.handles:
            handle.remove()
        super().uninstall()

    def _active(self) -> list[LayeredVocabularySeam]:
        return [seam for seam in self.__dict__["_group"] if not seam.is_bypassed()]

    def _expand(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first enabled seam replaces the batch of prompts by the rows to encode."""
        active = self._active()
        ids = kwargs.get(self.sites[0].argument, args[0] if args else None)
        if active and active[0] is not self:
            return None
        self.__dict__["_rows"] = None  # those of a forward pass that raised an error
        if not active or not isinstance(ids, Tensor):
            return None
        is_layered = torch.stack([seam.adapters[0].contains(ids) for seam in active]).any(0)
        rows = encoded_rows(is_layered, self.layers)
        for seam in active:
            seam.__dict__["_rows"] = rows
        expanded = [_take(value, rows.prompt, len(ids)) for value in (*args, *kwargs.values())]
        return tuple(expanded[: len(args)]), dict(zip(kwargs, expanded[len(args) :], strict=True))

    def _write_embeddings(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        ids, self._ids = self._ids, None
        if ids is None or self.is_bypassed():
            return None
        adapter = self.adapters[0]
        layer = self.__dict__["_rows"].layer
        return blend(adapter, adapter.output, cast(output, adapter), ids.reshape(output.shape[:-1]), layer).to(output.dtype)

    def _fold(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output for the prompts, of the first enabled seam."""
        rows, active = self.__dict__["_rows"], self._active()
        self.__dict__["_rows"] = None
        return _folded(output, rows.index) if rows is not None and active[0] is self else None


def _take(value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of a tensor with one row per prompt; other values unchanged."""
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value


def _folded(output: Any, index: Tensor) -> Any:
    """Output for rows as output for prompts: states (rows, tokens, width) side by side, the mean over layers of other tensors."""
    if isinstance(output, Tensor):
        layers = output[index]
        if output.ndim == 3:
            return layers.permute(1, 2, 0, 3).flatten(2)
        return layers[0] + (layers - layers[0]).mean(0)  # exact for equal layers
    if isinstance(output, Mapping):
        return type(output)(**{name: _folded(value, index) for name, value in output.items()})
    return tuple(_folded(value, index) for value in output) if isinstance(output, tuple) else output
