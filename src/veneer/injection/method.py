"""What a method is: a frozen config that builds an adapter for a site."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .errors import OptionError, UnknownOption
from .select import has_role
from .sites import Site

if TYPE_CHECKING:
    from .conditions import CallConditions

ParsedConditions = tuple[Mapping[str, Tensor], Mapping[str, Any]]


class CallState:
    """State of an adapter during one forward pass. Not part of the model's state; copies start empty.

    Attributes:
        conditions: the conditions of this call, or None. `prepared`: what `Method.prepare_call` computed from them.
    """

    def __init__(self) -> None:
        self.conditions: CallConditions | None = None
        self.prepared: Any = None

    def __deepcopy__(self, memo: Any) -> CallState:
        return CallState()


class Adapter(nn.Module):
    """Base of the small module that a method builds for one site.

    A subclass offers one or both of

    - `output(x, y) -> y'`: call form. `x` is what the site reads, `y` the host's own output there; shapes equal `y`'s.
    - `weight(W) -> W'`: weight form, for tensors that are read and for merging,
    - `output_(x, y) -> y'`: beside `output`, the same written over y, where nobody else can have kept y,
    - `input(x) -> x'`: what a called module reads, in the place of `output`, where that is the cheaper way to the same change.
    - `bias(b, W) -> b'`: beside `weight`, where the bias after the weight changes too; `W()` gives the weight from before.

    Beside `weight`, a sum of low rank may offer `factors() -> (C, D)` at its strength, with W' = W + C D for W as (groups, rows /
    groups, width): merging it then costs about a copy of W, and combining it needs no matrix of W's size.

    A method on a `TokenSite` offers `insert(tokens)` and `remove(tokens)` instead, one on an `AttentionSite`
    `attend(inner, attn, hidden_states, **kwargs)`, one on a `VocabularySite` `ids(ids)` and `output(ids, rows)`.

    The seam blends `y + strength * (output(x, y) - y)`, so that `strength` 0 is the host, exactly, and 1 the adapter,
    exactly. An adapter that already multiplies by `self.strength` (cheaper where the change is a sum) says so with
    `blends = True`.

    On a `BranchSite`, `reads = "normed"` says that x is the stream after the branch's norm; there and on a `StreamSite`,
    `reads = "write"` that x is y itself. `replaces = True` says that the adapter holds the whole value of its tensor, whatever
    the base has there.

    `adds = True` says that every form is a sum, such as W' = W + ΔW with a ΔW that does not depend on W: then the order of
    several on one layer makes no difference.

    `casts = False` says that x comes as the host has it, not in the adapter's dtype; beside `blends`, y does too. `group` tells
    one that keeps something from block to block which part of a mixed batch it is given.

    `switches = True` says that `output` gives another shape than y's, so that strengths are 0 or 1; it blends nothing itself.

    `conditions` holds the `CallConditions` of the current forward pass, for methods with `Method.conditions`.

    One on a `ResidualSite` offers `residuals(call)`, see `injection.residuals`.

    `remembered` names buffers that only training needs (not persistent): a checkpoint of a run keeps them, a file does not.

    One with both forms, of which `weight` is the cheaper at its site, says `prefers_weight = True`; then the host's tensor is
    changed in each pass, where it is no quantised one. A fresh adapter is in the training mode of its host.
    """

    adds: ClassVar[bool] = False
    blends: ClassVar[bool] = False
    casts: ClassVar[bool] = True
    group: int = 0
    prefers_weight: bool = False
    reads: ClassVar[Literal["read", "normed", "write"]] = "read"
    replaces: ClassVar[bool] = False
    switches: bool = False
    remembered: ClassVar[tuple[str, ...]] = ()
    strength: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("strength", torch.ones(()), persistent=False)
        self.call = CallState()

    @property
    def conditions(self) -> Any:
        """The `CallConditions` of the current forward pass, or None."""
        return self.call.conditions

    def enter(self, tower: nn.Module) -> None:
        """Called when it is attached: start from the host's own values, or change something beside the model (a tokenizer)."""

    def leave(self) -> None:
        """Undo `enter`. Called on detach and when an attach fails, also if it never entered."""


@dataclass(frozen=True)
class Need:
    """A kind of site that a method can use.

    Args:
        site: the site type.
        roles: role patterns it is limited to; empty for any.
        where: field values that the site must have, such as `{"can_insert": True}`; a tuple lists the allowed values, and `...`
            means any but None.
    """

    site: type[Site]
    roles: tuple[str, ...] = ()
    where: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """A method: a frozen dataclass whose fields are its options (CLI flags and saved JSON), and `build`.

    Class attributes:
        name: the file's stem, the paper's short name.
        paper: authors, title or venue and year, for the catalogue.
        needs: the kinds of site it can use; one match is enough.
        default: selection used when the caller gives no `where`; patterns of it that match nothing are passed over.
        elsewhere: selection where a model has nothing of `default`, as convolutional networks have no attention.
        identity_at_start: True if a fresh adapter leaves the output bitwise unchanged.
        learning_rate: what to train it with by default; `training` warns when a rate is far from it.
        keeps_head: True if a classifier keeps its own head under it, because the method maps the head's labels to new ones.
        conditions: names of the conditions that `Attachment.condition` takes, such as `("image",)`; empty for none.
        prepares: `once` if it must see the training data before it is trained, `epoch` if before every epoch; see `prepare`.
        revision: of what saved options and tensors compute; raised when the same ones compute another function. See `migrate`.
        shared_options: options that `build_shared` reads, which `by_site` cannot change.
    Args:
        by_site: other options at some sites, for a file whose layers differ: role pattern, or `name:` and a site's name, to
            options, such as `{"mlp.*": {"rank": 4}}` or `{"attn.{q,v}": {"rank": 4}}`. A site's own name counts before its
            role, and of role patterns the later.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    default: ClassVar[tuple[str, ...]]
    elsewhere: ClassVar[tuple[str, ...]] = ("mlp", "conv")
    identity_at_start: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    revision: ClassVar[int] = 1
    shared_options: ClassVar[tuple[str, ...]] = ()
    keeps_head: ClassVar[bool] = False
    prepares: ClassVar[Literal["", "once", "epoch"]] = ""
    conditions: ClassVar[tuple[str, ...]] = ()

    by_site: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True, hash=False)

    def at(self, site: Site) -> Method:
        """The config that counts at one site: this one, with the options that `by_site` has for it.

        Raises:
            ValueError: `by_site` has an option that the method does not have, or another value of a shared one.
        """
        if not self.by_site:
            return self
        own = {k: v for pattern, options in self.by_site.items() if means(pattern, site) for k, v in options.items()}
        own |= self.by_site.get(f"name:{site.name}", {})
        if not own:
            return self
        known = {f.name for f in dataclasses.fields(self)} - {"by_site"}
        if unknown := tuple(sorted(own.keys() - known)):
            message = f"by_site has {', '.join(unknown)}; options are {', '.join(sorted(known))}"
            raise OptionError(message, option="by_site", method=self.name, given=unknown)
        options = _tuples(own)
        fixed = [name for name in self.shared_options if options.get(name, getattr(self, name)) != getattr(self, name)]
        if fixed:
            message = f"by_site has {', '.join(fixed)}, which must be the same at all sites; set it for the whole method"
            raise OptionError(message, option="by_site", method=self.name, given=tuple(fixed))
        return dataclasses.replace(self, by_site={}, **options)

    def keys_by_site(self) -> dict[str, list[str]]:
        """Keys of every option by site; `attach` raises `SelectionError` for a key that matches no selected site."""
        return {"by_site": [*self.by_site]}

    @abstractmethod
    def build(self, site: Any) -> Adapter:
        """Build the adapter for one site. Must draw random numbers from torch's global generator only."""

    def build_shared(self, sites: Sequence[Any]) -> nn.Module | None:
        """What all adapters of one tower use together: each of them gets it as its child `shared`. None for nothing.

        Called before `build`, with the tower's chosen sites. Draws as `build` does. Trained once, and saved once.
        """
        return None

    def count(self, site: Any) -> int:
        """Number of trainable parameters at one site, from the paper's formula (the suite compares it with the built one).

        Without those of `build_shared`.
        """
        return sum(p.numel() for p in self.build(site).parameters())

    def groups(self, adapters: Iterable[tuple[Site, Adapter]]) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser. `lr_scale` multiplies the learning rate; one group by default."""
        return [{"params": list({id(p): p for _, a in adapters for p in a.parameters()}.values()), "lr_scale": 1.0}]

    def prepare(
        self,
        adapters: Iterable[tuple[Site, Adapter]],
        run: Callable[[Tensor], Any],
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        """A pass over the training data. Fills adapters' buffers, which are saved. See `Attachment.prepare`.

        Args:
            run: one pass of the model with the adapters on it, without a graph. `batches`: pictures (B, C, H, W) and labels (B,).
        """
        return None

    def parse_conditions(self, sites: Sequence[Site], pipeline: Any, **conditions: Any) -> ParsedConditions:
        """Conditions passed to `Attachment.condition`, as tensors with one row per image, and the other conditions unchanged.

        Raises:
            ConditionError: a condition cannot be used.
        """
        raise NotImplementedError(f"{self.name} has conditions and does not implement parse_conditions")

    def prepare_call(self, adapters: Sequence[tuple[Site, Adapter]]) -> None:
        """Called before a tower runs, after the `conditions` of its adapters are set: computes what they share."""
        return None

    def example(self, adapters: Sequence[tuple[Site, Adapter]], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Conditions of one picture that fit some inputs of a tower, the same every time."""
        return {}

    def penalty(self, adapters: Iterable[tuple[Site, Adapter]]) -> Tensor | None:
        """A term of its own that is added to the loss, with a graph; None for nothing. See `Attachment.penalty`."""
        return None

    def after_step(self, adapters: Iterable[tuple[Site, Adapter]], step: int, steps: int) -> None:
        """What a method does once an optimiser step: a schedule, pruning. See `Attachment.after_step`.

        A pure function of the adapters' tensors, their gradients and both numbers, so that a resumed run does the same: what it
        remembers is in buffers that are saved, or that `Adapter.remembered` names. Draws no random numbers.
        """
        return None

    def summary(self, adapters: Iterable[tuple[Site, Adapter]]) -> str:
        """A line for `Attachment.report` about the adapters as they are now; empty for nothing."""
        return ""

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """Two configs for the conformance suite, which may be attached to one bare model together; the defaults, twice."""
        return cls(), cls()

    def config(self) -> dict[str, Any]:
        """The options as plain JSON values; `by_site` only where it says something."""
        options = dataclasses.asdict(self)
        return options if self.by_site else {k: v for k, v in options.items() if k != "by_site"}

    @classmethod
    def migrate(cls, config: Mapping[str, Any], revision: int, tensors: Collection[str]) -> dict[str, Any]:
        """The options that mean now what a file's `config` meant in an earlier `revision`.

        Args:
            tensors: names of the file's tensors, `site:parameter`.
        Raises:
            ValueError: no options do.
        """
        return dict(config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Method:
        """Inverse of `config`.

        Raises:
            TypeError: an option that the method does not have.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(config) - known):
            message = f"{cls.name}: unknown option {', '.join(unknown)}. It has: {', '.join(sorted(known))}."
            raise UnknownOption(message, unknown[0], "option", given=tuple(unknown), expected=tuple(known), where=cls.name)
        return cls(**_tuples(config))


def means(pattern: str, site: Site) -> bool:
    """True if a key of `by_site` matches a site, by its name or its role."""
    return pattern[5:] == site.name if pattern.startswith("name:") else has_role(pattern, site.role)


def _tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
