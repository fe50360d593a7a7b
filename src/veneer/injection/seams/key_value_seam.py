"""The seam of added keys and values: a self-attention whose tokens read more than each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapter_forms import KeyValueAdapter
from ..attention_sites import SelfAttentionSite
from ..method import Adapter
from ..sites import WeightSite
from .adapter_calls import first_argument, main_output
from .sequence_seams import UnblendedSeam


class KeyValueSeam(UnblendedSeam):
    """Adds keys and values (`KeyValueAdapter`) to a self-attention, whose queries and outputs are those of its tokens.

    For n more keys, the module receives n tokens of zeros at the end; the outputs of its layers there are replaced by the keys
    and values, and its outputs there are left out. Of several such seams, the last one leaves out its tokens first. torch's
    `MultiheadAttention` calls no layers, but appends `bias_k` and `bias_v`, which may have n rows.
    """

    adapters: Sequence[KeyValueAdapter]
    _current: tuple[Tensor, Tensor, int] | None  # keys, values, and the position of the first new token

    def __init__(self, tower: nn.Module, parts: Sequence[tuple[SelfAttentionSite, Adapter]]) -> None:
        super().__init__(tower, parts)
        site = self.sites[0]
        self.home, self._current = site.path, None
        self.packed = isinstance(self.module(site.path), nn.MultiheadAttention)

    def hooks(self) -> list[RemovableHandle]:
        site: SelfAttentionSite = self.sites[0]
        attention: Any = self.module(site.path)
        enter, leave = (self._set_bias, self._clear_bias) if self.packed else (self._extend, self._shorten)
        handles = [
            attention.register_forward_pre_hook(enter, with_kwargs=True),
            attention.register_forward_hook(leave, prepend=True, always_call=True),
        ]
        layers = {} if self.packed else dict.fromkeys((site.key.path, site.value.path))
        return [*handles, *(self.module(path).register_forward_hook(self._write) for path in layers)]

    def _new_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (n, channels) in the dtype of x."""
        key, value = self.adapters[0].keys_values()
        return key.to(x.dtype), value.to(x.dtype)

    def _extend(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.active:
            return None
        x = first_argument(args, kwargs)
        key, value = self._new_rows(x)
        self._current = (key, value, x.shape[1])
        x = torch.cat([x, x.new_zeros(len(x), len(key), x.shape[-1])], 1)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})

    def _write(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        """Writes the keys and values into the rows of the added tokens."""
        if self._current is None:
            return None
        key, value, start = self._current
        site: SelfAttentionSite = self.sites[0]
        before, rows, after = y.tensor_split([start, start + len(key)], 1)
        for layer, new in ((site.key, key), (site.value, value)):
            if self.module(layer.path) is module:
                rows = _replace(rows, layer, new)
        return torch.cat([before, rows, after], 1)

    def _shorten(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current, self._current = self._current, None
        if current is None or output is None:
            return None
        after = main_output(output)[:, : current[2]]
        return (after, *output[1:]) if isinstance(output, tuple) else after

    def _set_bias(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active:
            return
        attention: Any = module
        for name, rows in zip(("bias_k", "bias_v"), self._new_rows(first_argument(args, kwargs)), strict=True):
            earlier = getattr(attention, name)
            setattr(attention, name, rows[:, None] if earlier is None else torch.cat([earlier, rows[:, None]]))

    def _clear_bias(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        attention: Any = module
        attention.bias_k = attention.bias_v = None


def _replace(y: Tensor, layer: WeightSite, rows: Tensor) -> Tensor:
    """y (batch, n, channels of the module) with `rows` (n, channels) as the output of a layer, or of rows of a fused one."""
    rows = rows.expand(len(y), -1, -1)
    if layer.rows is None:
        return rows
    start, stop = layer.rows
    return torch.cat([y[..., :start], rows, y[..., stop:]], -1)
