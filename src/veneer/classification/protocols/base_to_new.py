"""CoOp's protocol of generalization from base to new classes.

The first half of the classes, in the order of their numbers, are base classes: methods are trained on a few images of each, and
tested on their test images among the base classes. The other classes are new: the same adapter is tested on their test images
among the new classes, with prompts for their names.

Source: Zhou et al., Conditional Prompt Learning for Vision-Language Models, CVPR 2022, section 4.1, and its `subsample_classes`:
with an odd number, the base classes are one more. The few-shot sample is that of all classes. Deviations: those of the protocol
coop. Any other dataset: its classes are numbered alphabetically, and a sample is that of few-shot curves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate import Accelerator

from veneer.formats import load_all
from veneer.injection import methods
from veneer.injection.errors import OptionError
from veneer.injection.sites import FeatureSite
from veneer.training.data.latent_cache import cache_key
from veneer.training.fixed_adapters import restore_strengths
from veneer.training.loop.optimizer_step import AUTOCAST

from ..config import TransferConfig
from ..data.run_data import Data, Views
from ..models.loading import is_clip_name, open_classifier
from ..objectives.single_label import SINGLE_LABEL
from ..train.batches import logits_of
from ..train.method_rows import MethodRow

SHOTS = (16,)
"""Training images per class."""


def base_and_new(data: Data, order: Sequence[str]) -> tuple[Data, Data]:
    """The data of the base classes and of the new classes.

    Args:
        order: names of all classes, in the order of their numbers.
    """
    half = math.ceil(len(order) / 2)
    return _of_classes(data, frozenset(order[:half])), _of_classes(data, frozenset(order[half:]))


def _of_classes(data: Data, classes: frozenset[str]) -> Data:
    """The images of some classes, in the splits that they have."""
    source, splits = data.source, data.splits
    members = [i for i, each in enumerate(source.examples) if source.classes[each.label] in classes]
    place = {index: number for number, index in enumerate(members)}
    train, validation, test = (
        tuple(place[i] for i in indices if i in place) for indices in (splits.train, splits.validation, splits.test)
    )
    reduced = source.filter(lambda each: source.classes[each.label] in classes)
    digest = cache_key(reduced.digest, *train, "validation", *validation)
    return Data(reduced, dataclasses.replace(splits, train=train, validation=validation, test=test, digest=digest), data.notes)


def check_generalization(model: str, rows: Iterable[MethodRow]) -> None:
    """Raises if a classifier or a method cannot classify images into classes that it was not trained on.

    Raises:
        OptionError: the model is no CLIP; a method whose parameters belong to the trained classes; random weights.
    """
    if not is_clip_name(model):
        message = (
            f"model is {model}, whose head is trained for the base classes; base_to_new needs a CLIP, which encodes the names of "
            "new classes. Pass --model bundled_clip or open_clip:NAME/TAG."
        )
        raise OptionError(message, option="model", given=model, expected="CLIP")
    for row in rows:
        reason = "trains from random weights" if row.scratch else _class_bound(row)
        if reason:
            message = f"methods: {row.label} {reason}; base_to_new needs methods that apply to new classes. Leave it out."
            raise OptionError(message, option="methods", where=row.label, given=row.label, expected="new classes")


def _class_bound(row: MethodRow) -> str:
    """Why a method's parameters belong to the classes that it is trained on, or ""."""
    for name in () if row.method == "zero_shot" else row.method.split("+"):
        method = methods.get(name)
        on_logits = any(issubclass(need.site, FeatureSite) and "logits" in need.roles for need in method.needs)
        if on_logits or name == "linear_probe":
            return "changes the logits of the classes that it is trained on"
        if row.options.get(name, {}).get("by_class"):
            return "has a context for each class that it is trained on (by_class)"
    return ""


class NewClasses:
    """Accuracy of adapters on the test images of new classes.

    Args:
        data: images of the new classes. `config`: options that all runs share.
    """

    def __init__(self, data: Data, config: TransferConfig, accelerator: Accelerator) -> None:
        self.data, self.config, self.accelerator = data, config, accelerator
        self.classifier = open_classifier(config.model, data.classes, weights=config.weights, size=config.size, seed=config.seed)
        self.classifier.model.to(accelerator.device)

    def accuracy(self, adapter: Path | None) -> float:
        """Test accuracy of the model with the adapter file, or without one."""
        model, config = self.classifier.model, self.config
        attached = [] if adapter is None else load_all(model, adapter)
        try:
            restore_strengths(attached)
            with Views(self.data, self.classifier.data, "none", squash=config.squash, workers=config.workers) as views:
                batches = views.batches("test", config.batch)
                logits, labels = logits_of(model, batches, self.accelerator.device, AUTOCAST[config.mixed_precision])
        finally:
            for attachment in reversed(attached):
                attachment.detach()
        return SINGLE_LABEL.metrics(logits, labels).accuracy
