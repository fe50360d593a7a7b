"""Attributes of an `Attachment` that the modules it is composed of read. They import this protocol, the class imports them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ..conditions import Conditions
from ..method import Adapter, Method
from ..seams.seam import Seam
from ..sites import Site
from .extra_parameters import ExtraParameters


class AttachmentProtocol(Protocol):
    """An `Attachment`: its data, and what is needed to check, save and probe it."""

    name: str
    method: Method
    towers: Mapping[str, nn.Module]
    parts: dict[str, tuple[Site, Adapter]]
    supported_sites: tuple[Site, ...]
    extras: dict[str, tuple[str, str]]
    merged: bool
    conditions: Conditions | None
    pipeline: Any
    seams: list[Seam]
    trained: ExtraParameters
    is_enabled: bool

    @property
    def scale(self) -> float:
        """Strength: 0 is the host, 1 the adapter as trained."""

    def check(self) -> None:
        """Raises if the host was rebuilt or fused since attach."""

    def require_selection(self) -> None:
        """Raises in a forward pass with gradients while the entries to train are not selected."""

    def require_task(self) -> None:
        """Raises in a forward pass while the method needs a task and none is selected."""

    def penalty(self) -> Tensor | None:
        """The method's penalty of the last forward passes, or None."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the adapters and of `trained`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changed, under `site-name:parameter`."""
