"""NOAH's supernet: the weights of the largest sub-network, whose leading slices are the weights of all others."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from veneer.injection import Attachment
from veneer.injection.attachment.deferred_init import defer_init
from veneer.injection.attachment.model_state import statistics
from veneer.injection.errors import OptionError
from veneer.injection.method import Method
from veneer.training import param_groups
from veneer.training.loop.seeds import mix
from veneer.training.loop.trainer import Trainer

from ..config import TransferConfig
from ..data.run_data import Views
from ..models.classifier import Classifier
from ..train.attach_methods import attach_methods
from ..train.train import ClassifierTrainer
from .block_spaces import BlockSpace
from .sub_network import SubNetwork
from .sub_network_config import config_of

HOOKS = ("begin_pass", "penalty", "after_step", "compare_passes")
"""Functions by which a method takes part in training, beyond its adapters."""


class Supernet(ClassifierTrainer):
    """Trains a random sub-network in each step, and evaluates sub-networks with the weights that they share.

    A sub-network is attached as `veneer transfer` attaches it. Each of its parameters is the leading slice of the parameter of
    the same name in the largest sub-network, so of W (d, r) the first r' columns; its gradient is added to that slice. The
    sub-network of a step is a function of the seed and the step. BatchNorm statistics of random weights are updated in the model.

    Args:
        base: options of the training. `classifier`, `views`: the model, and the images. `space`: of the sub-networks.
        folder: for checkpoints.
    Raises:
        OptionError: adapters of a method have buffers.
    Source: Zhang, Zhou, Liu, Neural Prompt Search, 2022, section 3.3, and its code. Deviation: here the budget limits the search
    only, so the training samples larger sub-networks too, as the code does.
    """

    def __init__(
        self,
        base: TransferConfig,
        classifier: Classifier,
        views: Views,
        space: BlockSpace,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.space, self.base = space, base
        largest = config_of(base, space.sites, space.largest())
        attached = attach_methods(classifier, largest, views.data)
        try:
            super().__init__(classifier, attached, views, largest, folder, accelerator)
            self.weights = param_groups.named_parameters(attached)
            for attachment in attached:
                _check_buffers(attachment)
        finally:
            for attachment in reversed(attached):
                attachment.detach()

    @contextmanager
    def sub_network(self, sub: SubNetwork, *, training: bool) -> Iterator[list[Attachment]]:
        """Context manager: attaches a sub-network with its slices of the weights.

        Args:
            training: whether gradients reach the weights, and dropout is enabled.
        Raises:
            OptionError: a parameter is not a slice of one of the largest sub-network: it has another name, or a larger dimension.
        """
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), defer_init():
            attached = attach_methods(self.classifier, config_of(self.base, self.space.sites, sub), self.views.data)
        try:
            for name, parameter in param_groups.named_parameters(attached).items():
                whole = self._whole(name, parameter)
                index = tuple(slice(length) for length in parameter.shape)
                parameter.data = whole.data[index]
                if training:
                    parameter.register_hook(partial(_add_gradient, whole, index))
            for seam in (seam for attachment in attached for seam in attachment.seams):
                seam.train(training)
            yield attached
        finally:
            updated = statistics(self.model.named_modules()) if training and self._updates_statistics else []
            values = [buffer.clone() for _, buffer in updated]
            for attachment in reversed(attached):
                attachment.detach()  # restores the statistics
            for (_, buffer), value in zip(updated, values, strict=True):
                buffer.copy_(value)

    def _whole(self, name: str, parameter: Tensor) -> Tensor:
        """The weight whose leading slice a parameter is."""
        whole = self.weights.get(name)
        shape = None if whole is None else tuple(whole.shape)
        if whole is None or whole.ndim != parameter.ndim or any(map(int.__lt__, whole.shape, parameter.shape)):
            message = (
                f"methods: {name} has the shape {tuple(parameter.shape)} in a sub-network, which is no slice of its "
                f"shape in the largest one, {shape}. Leave the method out, choose other --sizes, or choose --space blocks."
            )
            raise OptionError(message, option="methods", where=name, given=tuple(parameter.shape), expected=shape)
        return whole

    def sample(self, step: int) -> SubNetwork:
        """The sub-network of a step."""
        rng = random.Random(mix(self.config.seed, "supernet", step))
        sub = self.space.sample_any(rng)
        return self.space.reduce(sub, rng) if sub.is_empty else sub

    def fit(self) -> None:
        """Trains the supernet, or continues after the last checkpoint.

        Raises:
            Diverged: the loss is no longer finite. KeyboardInterrupt: the training was stopped.
            CheckpointError: the checkpoints are of a supernet with other options, sizes or groups.
        """
        loss = self.loss()

        def sampled_loss(step: int, rows: list[int]) -> Tensor:
            with self.sub_network(self.sample(step), training=True):
                return loss(step, rows)

        self._set_modes()
        sites = self.space.sites
        choices = {"sizes": [[*method.sizes] for method in sites.methods], "groups": [[*bounds] for bounds in sites.groups]}
        data = {"splits": self.views.data.splits.digest, **self.classifier.identity}
        trainer = Trainer(
            self.config.loop(self.per_epoch, self.steps), self._groups(), sampled_loss, self.named, self.folder,
            identity={**self.config.identity(), **data, **choices}, accelerator=self.accelerator, on_step=self.on_step,
        )  # fmt: skip
        if trainer.fit(resume=True).stopped:
            raise KeyboardInterrupt

    def evaluate(self, sub: SubNetwork) -> tuple[float, float]:
        """Validation accuracy and loss of a sub-network with its slices of the weights."""
        with self.sub_network(sub, training=False):
            metrics = self.metrics("validation")
        return metrics.score, metrics.loss


def check_supernet(methods: Sequence[Method]) -> None:
    """Raises `OptionError` if a method takes part in training, so that a random sub-network in each step is not possible."""
    for method in methods:
        hooks = [name for name in HOOKS if getattr(type(method), name) is not getattr(Method, name)]
        hooks += [name for name in ("selects", "prepares", "needs_unlabeled", "needs_tasks") if getattr(method, name)]
        if hooks:
            message = (
                f"methods: {method.name} takes part in training ({', '.join(hooks)}), which a supernet does not support. Leave "
                "it out, or choose --space blocks."
            )
            raise OptionError(message, option="methods", method=method.name, given=tuple(hooks), expected=())


def _check_buffers(attachment: Attachment) -> None:
    """Raises `OptionError` if an attachment has buffers, which the supernet does not share."""
    state = param_groups.named_state([attachment])
    if buffers := tuple(state.keys() - param_groups.named_parameters([attachment]).keys()):
        message = (
            f"methods: {attachment.method.name} has buffers ({min(buffers)}), which the sub-networks of a supernet cannot share. "
            "Leave it out, or choose --space blocks."
        )
        raise OptionError(message, option="methods", method=attachment.method.name, given=buffers, expected=())


def _add_gradient(whole: Tensor, index: tuple[slice, ...], gradient: Tensor) -> None:
    """Adds the gradient of a slice to that of the whole parameter."""
    if whole.grad is None:
        whole.grad = torch.zeros_like(whole)
    whole.grad[index] += gradient
