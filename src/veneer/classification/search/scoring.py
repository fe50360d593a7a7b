"""Validation metrics of sub-networks: with the shared weights of a supernet, or after a short training."""

from __future__ import annotations

import dataclasses
import functools
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from veneer.training.loop.divergence import Diverged

from ..config import TransferConfig
from ..data.run_data import Views
from ..models.classifier import Classifier
from ..train.attach_methods import attach_methods
from ..train.train import ClassifierTrainer
from .block_sites import BlockSites
from .block_spaces import PrefixSpace
from .config import SearchConfig
from .space import Space
from .sub_network import SubNetwork
from .sub_network_config import config_of
from .supernet import Supernet, check_supernet

Scorer = Callable[[SubNetwork], tuple[float, float] | None]
"""Validation accuracy and loss of a sub-network; None if its training diverged."""


class CandidateTraining:
    """Trains sub-networks one by one, each with the complete schedule of `base.epochs` passes over the training images.

    Args:
        base: options of the training. `classifier`, `views`: the model, and the images.
        sites: the blocks. `folder`: for the files of the running trial.
    """

    def __init__(
        self,
        base: TransferConfig,
        classifier: Classifier,
        views: Views,
        sites: BlockSites,
        folder: Path,
        accelerator: Accelerator,
    ) -> None:
        self.base, self.classifier, self.views, self.sites = base, classifier, views, sites
        self.folder, self.accelerator = folder, accelerator

    def __call__(self, sub: SubNetwork) -> tuple[float, float] | None:
        """Validation accuracy and loss of the best epoch, or None if the training diverged.

        Raises:
            KeyboardInterrupt: the training was stopped.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        config = dataclasses.replace(config_of(self.base, self.sites, sub), resume=False)
        attached = attach_methods(self.classifier, config, self.views.data)
        try:
            trainer = ClassifierTrainer(self.classifier, attached, self.views, config, self.folder, self.accelerator)
            epoch = trainer.train().best
        except Diverged:
            return None
        finally:
            for attachment in reversed(attached):
                attachment.detach()
            shutil.rmtree(self.folder, ignore_errors=True)
        if epoch is None:
            raise KeyboardInterrupt
        return (epoch.val_accuracy, epoch.val_loss) if math.isfinite(epoch.val_loss) else None


def scorer(
    config: SearchConfig, base: TransferConfig, space: Space, classifier: Classifier, views: Views, out: Path,
    accelerator: Accelerator,
) -> Scorer:  # fmt: skip
    """The function that scores the sub-networks of a search. NOAH's supernet is trained, or continued, before its first score.

    Args:
        base: options of the training. `out`: run folder; the supernet's checkpoints are in `supernet`.
    Raises:
        OptionError: a method that a supernet does not support.
    """
    if isinstance(space, PrefixSpace):
        check_supernet([method.build(method.sizes[-1]) for method in space.sites.methods])
        whole = dataclasses.replace(base, epochs=config.supernet_epochs, cache=False)
        supernet = Supernet(whole, classifier, views, space, out / "supernet", accelerator)
        fit = functools.cache(supernet.fit)

        def score(sub: SubNetwork) -> tuple[float, float]:
            fit()
            return supernet.evaluate(sub)

        return score
    trial = dataclasses.replace(base, epochs=config.trial_epochs)
    return CandidateTraining(trial, classifier, views, space.sites, out / "trial", accelerator)
