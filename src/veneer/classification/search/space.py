"""Spaces of sub-networks: which of them there are, and how they are sampled, mutated and crossed."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

from veneer.injection.errors import OptionError

from .block_sites import BlockSites
from .sub_network import SubNetwork


class Space(ABC):
    """Sub-networks of a model with a limit of their trainable parameters, without the head.

    All results are functions of the arguments and the state of `rng`.

    Args:
        sites: the model's blocks and the methods. `budget`: largest number of parameters.
    Raises:
        OptionError: the smallest sub-network has more parameters; `expected` is their number.
    """

    def __init__(self, sites: BlockSites, budget: int) -> None:
        self.sites, self.budget = sites, budget
        least = self.least_parameters()
        if budget < least:
            message = (
                f"budget_parameters is {budget:,}, but the smallest sub-network has {least:,} trainable parameters. Raise "
                "--budget-parameters, or choose smaller --sizes or other --methods."
            )
            raise OptionError(message, option="budget_parameters", given=budget, expected=least)

    def parameters(self, sub: SubNetwork) -> int:
        """Trainable parameters of a sub-network, without the head."""
        return sum(self.sites.count(m, g, sub.sizes[m][g]) for m, g in sub.entries())

    def has(self, sub: SubNetwork) -> bool:
        """True if a sub-network is within the budget and not empty."""
        return not sub.is_empty and self.parameters(sub) <= self.budget

    def initial(self) -> Sequence[SubNetwork]:
        """Sub-networks that are evaluated first."""
        return ()

    @abstractmethod
    def least_parameters(self) -> int:
        """Trainable parameters of the smallest sub-network."""

    @abstractmethod
    def sample_any(self, rng: random.Random) -> SubNetwork:
        """Samples a sub-network without regard to the budget."""

    @abstractmethod
    def sample(self, rng: random.Random) -> SubNetwork:
        """Samples a sub-network within the budget."""

    @abstractmethod
    def mutate(self, sub: SubNetwork, rng: random.Random, probability: float) -> SubNetwork:
        """Changes each choice with a probability."""

    @abstractmethod
    def cross(self, first: SubNetwork, second: SubNetwork, rng: random.Random) -> SubNetwork:
        """Takes each part from either sub-network."""
