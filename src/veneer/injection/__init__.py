"""The shared injection registry: sites, methods, hosts, seams and attachments. Knows torch, nothing else."""

from .attachment.attach import attach, attachments, merges
from .attachment.attachment import Attachment
from .composition.activation import activate
from .composition.compose import compose
from .composition.mixed_batch import mixed
from .composition.nodes import Average, Parallel, Stack
from .errors import (
    BlockedGradient,
    ConditionError,
    DeadSite,
    HostChanged,
    LoadError,
    OptionError,
    SaveError,
    SelectionError,
    StateError,
    UnknownName,
    UnknownOption,
    UnsupportedSite,
    VeneerError,
)
from .host import Host
from .method import Adapter, Method, Need
from .registry import hosts, methods
from .towers import sites

__all__ = [
    "Adapter",
    "Attachment",
    "Average",
    "BlockedGradient",
    "ConditionError",
    "DeadSite",
    "Host",
    "HostChanged",
    "LoadError",
    "Method",
    "Need",
    "OptionError",
    "Parallel",
    "SaveError",
    "SelectionError",
    "Stack",
    "StateError",
    "UnknownName",
    "UnknownOption",
    "UnsupportedSite",
    "VeneerError",
    "activate",
    "attach",
    "attachments",
    "compose",
    "hosts",
    "merges",
    "methods",
    "mixed",
    "sites",
]
