"""The shared injection registry: sites, methods, hosts, seams and attachments. Knows torch, nothing else."""

from .attachment.attach import attach, attachments, merges
from .attachment.attachment import Attachment
from .composition.activation import activate
from .composition.mixed_batch import mixed
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
    "BlockedGradient",
    "ConditionError",
    "DeadSite",
    "Host",
    "HostChanged",
    "LoadError",
    "Method",
    "Need",
    "OptionError",
    "SaveError",
    "SelectionError",
    "StateError",
    "UnknownName",
    "UnknownOption",
    "UnsupportedSite",
    "VeneerError",
    "activate",
    "attach",
    "attachments",
    "hosts",
    "merges",
    "methods",
    "mixed",
    "sites",
]
