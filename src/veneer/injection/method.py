"""Base classes of methods: a frozen config that builds an adapter for a site."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .errors import OptionError, UnknownOption
from .select import has_role
from .sites import Site
from .training_protocol import TrainingProtocol

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
    """Base class of the module that a method builds for one site.

    A subclass implements the forms that its sites need, such as `output(x, y)` or `weight(W)`: see `injection.adapter_forms`.

    The seam computes `y + strength * (output(x, y) - y)`: at `strength` 0 exactly the host, at 1 exactly the adapter. A new
    adapter is in the training mode of its host.

    | flag | type | default | meaning |
    | --- | --- | --- | --- |
    | `adds` | bool | False | every form is a sum, W' = W + ΔW, with ΔW independent of W: the order of attaching is irrelevant |
    | `applies_strength` | bool | False | the forms multiply by `self.strength` themselves, which is cheaper for a sum |
    | `casts` | bool | True | x is cast to the adapter's dtype; else x (and y, with `applies_strength`) has the host's dtype |
    | `overwrites` | bool | False | `output` takes a third argument; if it is True, y may be modified in place |
    | `prefers_weight` | bool | False | `weight` is cheaper than `output` here: W is parametrized, unless quantized |
    | `input_port` | str | `"read"` | x on a `BranchSite`: the stream; `"normed"` after the norm; `"write"` y (`StreamSite` too) |
    | | | | `"inner"` on a `BranchSite`: what its module reads, after the norm and a modulation |
    | | | | `"enter"` on a `StreamSite`: x and y are the input of the block, which is changed |
    | | | | `"tokens"` on a `FeatureSite`: x is the tokens before pooling |
    | `training_buffers` | tuple of str | `()` | non-persistent buffers that training checkpoints keep and saved files do not |
    | `unsaved` | tuple of str | `()` | parameters that checkpoints keep and files do not: saved buffers have their result |
    | `replaces` | bool | False | the adapter replaces its tensor: the result does not depend on the base value |
    | `chooses` | bool | False | the parameters make a choice, which has no gradient: `Method.penalty` alone trains them |
    | `changes_shape` | bool | False | `output` has another shape than y: strength is 0 or 1, and nothing is blended |

    Attributes:
        strength: buffer (), 0 to 1.
        group: in a mixed batch, index of the current group of samples; for adapters with state across blocks.
        conditions: the `CallConditions` of the current forward pass, for methods with `Method.conditions`, else None.
    """

    adds: ClassVar[bool] = False
    applies_strength: ClassVar[bool] = False
    casts: ClassVar[bool] = True
    overwrites: ClassVar[bool] = False
    prefers_weight: bool = False
    input_port: ClassVar[Literal["read", "normed", "inner", "write", "enter", "tokens"]] = "read"
    training_buffers: ClassVar[tuple[str, ...]] = ()
    unsaved: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    changes_shape: bool = False
    group: int = 0
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
        """Called on attach: initializes from the host's weights, or changes objects outside the model, such as a tokenizer."""

    def leave(self) -> None:
        """Undoes `enter`. Called on detach and when an attach fails, also if `enter` was not called."""


@dataclass(frozen=True)
class Need:
    """A kind of site that a method supports.

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
class Method(TrainingProtocol, ABC):
    """A method: a frozen dataclass with `build`. Its fields are the options: CLI flags and saved JSON.

    Class attributes:
        name: stem of the module's file, the short name in the paper.
        paper: authors, title or venue and year, for the catalog.
        needs: the kinds of site that it supports; a site must match one of them.
        uses: what it is used for, the main use first, by the keys of `method_search.USES`; for the catalog.
        recommended_for: those of its uses for which it is a good first choice.
        default: selection used without a `where`; patterns of it that match nothing are ignored.
        fallback: selection for models without any site of `default`, such as convolutional networks, which have no attention.
        identity_at_start: True if a fresh adapter leaves the output bitwise unchanged.
        learning_rate: default learning rate; `training` warns if a rate is far from it.
        keeps_head: True if a classifier keeps its head, because the method maps the head's labels to new ones.
        conditions: names of the conditions that `Attachment.condition` takes, such as `("image",)`; empty for none.
        prepares: `once` if `prepare` runs before training, `epoch` if before every epoch.
        needs_tasks: True if it has the option `tasks` and another function for each task; see `Attachment.task`.
        selects: True if `select` must run before the first step; adapters have `is_selected`, True after it.
        revision: incremented when the same saved options and tensors compute another function. See `migrate`.
        shared_options: options of all sites together, such as those that `build_shared` reads; `by_site` cannot change them.
    Args:
        by_site: other options at some sites: a role pattern or `name:` and the name of a site, then options, such as
            `mlp.*:rank=4` or `name:unet.conv_in:rank=4,alpha=2` as a flag, in Python `{"mlp.*": {"rank": 4}}`. Names take
            precedence over role patterns, and later role patterns over earlier ones.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[Need, ...]]
    default: ClassVar[tuple[str, ...]]
    uses: ClassVar[tuple[str, ...]] = ()
    recommended_for: ClassVar[tuple[str, ...]] = ()
    fallback: ClassVar[tuple[str, ...]] = ("mlp", "conv")
    identity_at_start: ClassVar[bool] = True
    learning_rate: ClassVar[float] = 1e-3
    revision: ClassVar[int] = 1
    shared_options: ClassVar[tuple[str, ...]] = ()
    keeps_head: ClassVar[bool] = False
    prepares: ClassVar[Literal["", "once", "epoch"]] = ""
    selects: ClassVar[bool] = False
    conditions: ClassVar[tuple[str, ...]] = ()

    by_site: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True, hash=False)

    def at(self, site: Site) -> Method:
        """The config of one site: this one, with the overrides of `by_site`.

        Raises:
            ValueError: `by_site` has an option that the method does not have, or overrides a shared option.
        """
        if not self.by_site:
            return self
        matching = (options for pattern, options in self._by_role.items() if has_role(pattern, site.role))
        overrides = {k: v for options in matching for k, v in options.items()}
        overrides |= self.by_site.get(f"name:{site.name}", {})
        if not overrides:
            return self
        known = {f.name for f in dataclasses.fields(self)} - {"by_site"}
        if unknown := tuple(sorted(overrides.keys() - known)):
            message = f"by_site has {', '.join(unknown)}; options are {', '.join(sorted(known))}"
            raise OptionError(message, option="by_site", method=self.name, given=unknown)
        options = _lists_to_tuples(overrides)
        changed = [name for name in self.shared_options if options.get(name, getattr(self, name)) != getattr(self, name)]
        if changed:
            message = f"by_site has {', '.join(changed)}, which must be the same at all sites; set it for the whole method"
            raise OptionError(message, option="by_site", method=self.name, given=tuple(changed))
        return dataclasses.replace(self, by_site={}, **options)

    @functools.cached_property
    def _by_role(self) -> dict[str, Mapping[str, Any]]:
        return {pattern: options for pattern, options in self.by_site.items() if not pattern.startswith("name:")}

    def distinct_sites(self, sites: Sequence[Any]) -> Sequence[Any]:
        """The selected sites that get an adapter: without those whose tensor is trained by the adapter of another one."""
        return sites

    @abstractmethod
    def build(self, site: Any) -> Adapter:
        """Builds the adapter of one site. Must use no other random numbers than those of torch's global generator."""

    def changes_at_start(self, site: Any) -> bool:
        """True if a fresh adapter of this site changes the output; for methods of which only some sites do."""
        return not self.identity_at_start

    def build_shared(self, sites: Sequence[Any]) -> nn.Module | None:
        """Builds a module that all adapters of one tower share, as their child `shared`, or None.

        Called before `build`, with the selected sites of the tower. Random numbers as in `build`. Saved only once.
        """
        return None

    def count(self, site: Any) -> int:
        """Number of trainable parameters at one site by the paper's formula, without those of `build_shared`.

        The conformance suite compares it with the built adapter.
        """
        return sum(p.numel() for p in self.build(site).parameters())

    def groups(self, adapters: Iterable[tuple[Site, Adapter]]) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer; one group by default.

        `lr_scale` multiplies the learning rate; `weight_decay` replaces that of the run, such as 0 for gates.
        """
        return [{"params": list({id(p): p for _, a in adapters for p in a.parameters()}.values()), "lr_scale": 1.0}]

    def prepare(
        self, adapters: Iterable[tuple[Site, Adapter]], run: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, Tensor]]
    ) -> None:
        """Runs over the training data and sets buffers of the adapters, which are saved. See `Attachment.prepare`.

        Args:
            run: a forward pass of the adapted model without autograd. `batches`: images (B, C, H, W) and labels (B,).
        """

    def select(self, adapters: Sequence[tuple[Site, Adapter]], losses: Iterable[Tensor]) -> None:
        """Selects the entries that are trained, by gradients, into saved buffers. See `Attachment.select`."""
        return None

    def parse_conditions(self, sites: Sequence[Site], pipeline: Any, **conditions: Any) -> ParsedConditions:
        """The conditions of `Attachment.condition`: tensors with one row per image, and the other conditions unchanged.

        Raises:
            ConditionError: a condition is invalid.
        """
        raise NotImplementedError(f"{self.name} has conditions and does not implement parse_conditions")

    def prepare_call(self, adapters: Sequence[tuple[Site, Adapter]]) -> None:
        """Called before each forward pass of a tower, after the `conditions` of its adapters are set: computes shared values."""
        return None

    def example(self, adapters: Sequence[tuple[Site, Adapter]], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Deterministic conditions of one image for sample inputs of a tower."""
        return {}

    def summary(self, adapters: Iterable[tuple[Site, Adapter]]) -> str:
        """A line for `Attachment.report` about the current state of the adapters, or an empty string."""
        return ""

    @classmethod
    def examples(cls) -> tuple[Method, Method]:
        """Two configs for the conformance suite, which attaches both to one model; by default they are equal."""
        return cls(), cls()

    def config(self) -> dict[str, Any]:
        """The options as JSON values; `by_site` only if it is not empty."""
        options = dataclasses.asdict(self)
        return options if self.by_site else {k: v for k, v in options.items() if k != "by_site"}

    @classmethod
    def migrate(cls, config: Mapping[str, Any], revision: int, tensors: Collection[str]) -> dict[str, Any]:
        """The options with which this revision computes the same function as an earlier revision with a file's `config`.

        Args:
            tensors: names of the file's tensors, `site:parameter`.
        Raises:
            ValueError: there are no such options.
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
        return cls(**_lists_to_tuples(config))


def _lists_to_tuples(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options from JSON, which has no tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
