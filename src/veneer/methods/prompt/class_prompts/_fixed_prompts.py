"""Class weights from prompts without learned vectors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.injection.method import Adapter, Method, Need
from veneer.injection.sites import ParamSite, PromptSite


class FixedPromptAdapter(Adapter):
    """Class weights (classes, features) from prompts with the token ids `ids`, a buffer. No parameters."""

    ids: Tensor
    texts: Any

    def __init__(self, site: PromptSite, ids: Tensor) -> None:
        super().__init__()
        self.path = site.path
        self.register_buffer("ids", ids, persistent=False)

    def enter(self, tower: nn.Module) -> None:
        """Finds the text tower."""
        self.__dict__["texts"] = tower.get_submodule(self.path)  # a plain attribute, not a submodule

    def leave(self) -> None:
        """Drops the reference to the text tower."""
        self.__dict__.pop("texts", None)

    def output(self, x: Tensor, y: Tensor) -> Tensor:
        """x: the image features; y: the class weights so far, including changes by other attachments."""
        weights = self.weights()
        return weights if self.texts.alone else weights + (y - self.texts.forward(x).to(y.dtype))

    @abstractmethod
    def weights(self) -> Tensor:
        """Class weights (classes, features) of the prompts."""


@dataclass(frozen=True)
class FixedPromptMethod(Method):
    """Base of methods that replace the classifier's templates by fixed prompts and train deltas of the biases of both towers."""

    needs: ClassVar[tuple[Need, ...]] = (
        Need(PromptSite),
        Need(ParamSite, roles=("bias", "bias.*"), where={"prompted": True}),
    )
    default: ClassVar[tuple[str, ...]] = ("prompts", "bias", "text/bias")
    identity_at_start: ClassVar[bool] = False
    learning_rate: ClassVar[float] = 1e-3
