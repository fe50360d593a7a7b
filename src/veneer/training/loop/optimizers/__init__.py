"""Optimizers by name, their arguments and learning rates, and their state as named tensors and JSON values."""

from .arguments import parse_arguments
from .build import ParameterGroup, base_rate, build, group_settings, set_rates, warn_ignored_rates
from .catalog import OptimizerWarning, averages_weights, canonical_name, check_name, is_learning_rate_free, names
from .modes import end_training, evaluation_weights, start_training
from .state import names_of, pack, unpack

__all__ = [
    "OptimizerWarning", "ParameterGroup", "averages_weights", "base_rate", "build", "canonical_name", "check_name",
    "end_training", "evaluation_weights", "group_settings", "is_learning_rate_free", "names", "names_of", "pack",
    "parse_arguments", "set_rates", "start_training", "unpack", "warn_ignored_rates",
]  # fmt: skip
