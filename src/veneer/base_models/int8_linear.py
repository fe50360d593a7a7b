"""bitsandbytes' 8-bit layer, with its scale on the device of the weight. Importing this module imports bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from bitsandbytes.nn.modules import Linear8bitLt
from torch import Tensor


class MovableLinear8bitLt(Linear8bitLt):
    """`Linear8bitLt` whose scale moves with its weight.

    The scale is no parameter, but an attribute of the weight and after the first forward pass of `state`, next to an alias of the
    weight's values. `nn.Module.to` moves neither if an ancestor of the layer is moved.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        in_weight, in_state = cast(Any, self.weight).SCB, cast(Any, self.state).SCB
        super()._apply(fn, recurse)
        weight: Any = self.weight  # may be another object than before
        state: Any = self.state
        if in_weight is not None:
            weight.CB, weight.SCB = weight.data, _move(in_weight, fn)
        if in_state is not None:
            state.CB, state.SCB = weight.data, _move(in_state, fn)
        return self


def _move(scale: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The scale after `fn`, in its dtype: rounding it to the dtype of the model would change the weight."""
    moved = fn(scale)
    return moved if moved.dtype == scale.dtype else scale.to(moved.device)
