"""The methods of a run on its classifier."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from veneer.injection import Attachment, attach
from veneer.training.initial_adapter import InitialAdapters, read_initial
from veneer.training.loop.seeds import mix

from ..config import TransferConfig
from ..data.run_data import Data
from ..models.classifier import Classifier

logger = logging.getLogger(__name__)


def attach_methods(classifier: Classifier, config: TransferConfig, data: Data) -> list[Attachment]:
    """Attaches the methods, seeded or from the weights of a file, and a `linear_probe` if no method trains the fresh head."""
    attached: list[Attachment] = []
    labels = Counter(data.source.examples[i].label for i in data.splits.train)
    configs = config.build_methods(len(data.classes), max(labels.values()))
    initial = None if config.init_from is None else read_initial(classifier.model, config.init_from, configs)
    for method in configs:
        torch.manual_seed(mix(config.seed, "adapters", method.name))
        attached.append(attach(classifier.model, method, where=config.selection_of(method.name)))
        attached[-1].begin_pass(config.seed, 0)  # for passes before training
    if classifier.fresh and not any(_trains_head(a) for a in attached):
        attached.append(attach(classifier.model, "linear_probe"))
    for change in [] if initial is None else initial.load_into(_initialized(initial, attached, len(configs))):
        logger.info("init-from: %s", change)
    return attached


def _initialized(initial: InitialAdapters, attached: list[Attachment], methods: int) -> list[Attachment]:
    """The attachments that get weights of the file: without the new head, if the file has none, such as one of prompts alone."""
    has_head = any(each.method.name == "linear_probe" for each in initial.adapters)
    return attached if has_head else attached[:methods]


def _trains_head(attachment: Attachment) -> bool:
    return any(adapter.replaces and site.role == "head" for site, adapter in attachment.parts.values())


@contextlib.contextmanager
def adapters_disabled(attached: Iterable[Attachment]) -> Iterator[None]:
    """Context manager: disables the attachments."""
    with contextlib.ExitStack() as stack:
        for attachment in attached:
            stack.enter_context(attachment.enabled(False))
        yield
