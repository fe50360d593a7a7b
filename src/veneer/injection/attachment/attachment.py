"""What `attach` returns: one method on one model, its switches and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..composition import merge as merging
from ..conditions import Conditions, condition_scope, parse_conditions
from ..errors import OptionError, StateError
from ..method import Adapter
from ..sites import Site
from .data_preparation import prepare
from .installation import Joined
from .model_state import Merge, open_ledger
from .plan import Plan
from .probe import probe
from .report import Report
from .state_dict import LoadReport, load_state, state_of


class Attachment:
    """One method on one model: its sites, adapters and the way back.

    Attributes:
        name: unique among the model's attachments. `method`: the config. `where`: the selection as given.
        parts: site name to (site, adapter).
        merged: True while folded into the weights.
        conditions: those of the current `condition` scope, or None.
        pipeline: a weak reference to the pipeline that was attached to, or None.
        loaded: what was read, if it came from a file. `provenance`: where it came from, saved with it.
    """

    def __init__(self, planned: Plan, name: str) -> None:
        self.name = name
        self.method = planned.method
        self.where = planned.where
        self.train = planned.train
        self.towers = planned.towers
        self.parts: dict[str, tuple[Site, Adapter]] = {s.name: (s, a) for s, a in planned.parts}
        self.offered = planned.offered
        self.extras: dict[str, tuple[str, str]] = planned.extras
        self.merged = False
        self.loaded: LoadReport | None = None
        self.provenance: dict[str, Any] = {}
        self._joined = Joined(self, planned)
        self.trained = self._joined.trained
        self.conditions: Conditions | None = None
        self.pipeline: Any = None
        self._scale, self._on = 1.0, True
        self._pristine: merging.Pristine | None = None

    # leaving and state of the host

    def detach(self) -> None:
        """Take the adapters off: keys, order, types, hooks, `requires_grad`, statistics and outputs as before, bitwise.

        Raises:
            StateError: it is merged (unmerge first) or detached already.
        """
        self._joined.refuse_mixed()
        if self.merged:
            raise StateError(f"'{self.name}' is merged. Call unmerge() before detach().", where=self.name, given="merged")
        if not self._joined.seams:
            raise StateError(f"'{self.name}' is detached already.", where=self.name, given="detached")
        self._joined.leave()

    def check(self) -> None:
        """Raise if the host was rebuilt or fused since attach, so that adapters would be bypassed.

        Raises:
            HostChanged: naming the site and what changed.
        """
        if not self._joined.seams:
            raise StateError(f"'{self.name}' is detached.", where=self.name, given="detached")
        self._joined.check(self.merged)

    def host_state_dict(self, component: str = "") -> dict[str, Tensor]:
        """The host's own state dict, with the keys and order of the bare host also where tensors are parametrised."""
        tower = self.towers[component or next(iter(self.towers))]
        return dict(merging.host_tensors(tower))

    # parameters and state

    def parameters(self) -> Iterator[nn.Parameter]:
        """The adapters' parameters and the base parameters named in `train`."""
        yield from (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`site-name:parameter` and the parameter, in site order; shared ones once."""
        seen: set[int] = set()
        for name, (_, adapter) in self.parts.items():
            for key, p in adapter.named_parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield f"{name}:{key}", p
        yield from self.trained.items()

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: the method's, and one for `train`."""
        groups = self.method.groups(list(self.parts.values()))
        extra = [p for _, p in self.trained.items()]
        return [*groups, {"params": extra, "lr_scale": 1.0}] if extra else groups

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]], run: nn.Module | None = None) -> None:
        """Let the method see the training data, where it wants to (`method.prepares`); for models with one picture input.

        `veneer transfer` calls it; your own loop does so before the first step, or before every epoch.

        Args:
            batches: pictures (B, C, H, W) as the model takes them, and labels (B,).
            run: in the model's place: its head, where the batches are features.
        """
        prepare(self, batches, run)

    def penalty(self) -> Tensor | None:
        """The method's own term of the loss, to be added before `backward()`; None for most methods."""
        return self.method.penalty(list(self.parts.values()))

    def after_step(self, step: int, steps: int) -> None:
        """Tell the method that the optimiser has made a step. Call it before the gradients are cleared.

        `veneer.training` calls this and `penalty`; your own loop does so where a method's documentation asks for it.

        Args:
            step: steps done, this one included. `steps`: in the whole run.
        Raises:
            ValueError: `step` is not in 1 … `steps`.
        """
        if not 1 <= step <= steps:
            message = f"'{self.name}': after_step({step}, {steps}): steps are counted from 1 to {steps}."
            raise OptionError(message, option="step", where=self.name, given=step, expected=(1, steps))
        self.method.after_step(list(self.parts.values()), step, steps)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changed, under `site-name:parameter`, norm statistics of the host included."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> LoadReport:
        """Copy tensors in.

        Raises:
            LoadError: `strict` and a tensor is missing, unused or misshapen; nothing has been changed then.
        """
        return load_state(self, state, strict)

    def swap(self, path: str | PathLike[str], *, base: Literal["same", "any"] = "same") -> LoadReport:
        """Put another file's values in the place of these, where they are: no hook, shape or graph changes. All or nothing.

        The model then gives what it gives with that file loaded in this one's place, at the same `scale`. LoRA, DoRA, LoHa,
        LoKr and OFT are rooms: a lower rank, another alpha or smaller blocks go in exactly, and what the file lacks becomes no
        change. Other methods take files of their own options and sites. A swapped room is for use: its zeros do not train.

        Args:
            path: a file of any format, of one attachment of this method. `base`: as for `veneer.load`.
        Raises:
            LoadError: it does not fit; it says what would. StateError: merged or detached. Nothing has been changed then.
        """
        from veneer.formats._core.swap import swap

        return swap(self, path, base=base)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the native file (`.safetensors`; the suffix is added). Returns its path."""
        from veneer.formats import native

        self.check()
        return native.save(self, path)

    # conditions and strength

    def condition(
        self, *, strength: float = 1.0, start: float = 0.0, end: float = 1.0, pipeline: Any = None, **conditions: Any
    ) -> AbstractContextManager[None]:
        """A `with` block in which the model is called with these conditions; the earlier ones come back after it.

        A pipeline is called as ever: with guidance, several prompts and several pictures a prompt. One condition counts for all
        samples; of several the n-th for the n-th prompt. Where activations are recomputed, go backward before the next call.

        Args:
            strength: multiplies `scale`, here only. `start`, `end`: the part of the schedule in which it acts, 0 to 1.
            pipeline: what is called, where it is not what was attached to: another pipeline, or a bare model.
            conditions: what the method takes, such as `image=`.
        Raises:
            ConditionError: the method takes no conditions or others, or one cannot be used.
        """
        return condition_scope(self, parse_conditions(self, conditions, strength, start, end, pipeline))

    @property
    def scale(self) -> float:
        """Strength: 0 is the host, 1 the adapter as trained. A buffer write; no recompilation."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if self.merged:
            message = f"'{self.name}' is merged at scale {self._scale}. Call unmerge() before changing it."
            raise StateError(message, where=self.name, given="merged")
        self._write(float(value), self._on)

    @contextlib.contextmanager
    def enabled(self, on: bool) -> Iterator[None]:
        """Switch the adapters on or off inside a `with` block; the earlier state comes back after it."""
        if self.merged:
            raise StateError(f"'{self.name}' is merged. Call unmerge() before switching it.", where=self.name, given="merged")
        before = self._on
        self._write(self._scale, on)
        try:
            yield
        finally:
            self._write(self._scale, before)

    def _write(self, scale: float, on: bool) -> None:
        strength = scale if on else 0.0
        for seam in self._joined.seams:
            seam.check_strength(strength)
        for seam in self._joined.seams:
            seam.write_strength(strength)
        self._scale, self._on = scale, on

    # folding into weights

    def merge(self) -> merging.MergeReport:
        """Fold the adapters into the base weights: W' = weight(W) at the current scale, rounded once to W's dtype.

        Memory: W' is written beside W, and W is kept for `unmerge`: as much again as the adapted weights, for each merge.
        Order: of several attachments the first merged is applied first, and those that stay beside are applied to the result.
        Merged in the order of attaching, outputs stay as they are; in another only where all changes are sums, as LoRA's.
        `veneer.merges(model)` tells what is merged, in which order and at which scale.

        Raises:
            StateError: merged already or detached.
            UnsupportedSite: the method has no weight form, or a weight is quantised, offloaded or computed from others.
            Nothing has been changed then.
        """
        self._joined.refuse_mixed()
        if self.merged:
            raise StateError(f"'{self.name}' is merged already.", where=self.name, given="merged")
        self.check()
        pristine, report = merging.fold(self.towers, list(self.parts.values()))
        try:
            for seam in self._joined.seams:
                seam.uninstall()
        except BaseException:
            merging.unfold(self.towers, pristine)
            self._joined.join_again()
            raise
        self._pristine, self.merged = pristine, True
        self._joined.link()
        for tower in self.towers.values():
            open_ledger(tower).merged.append(Merge(self, self._scale if self._on else 0.0))
        return report

    def unmerge(self) -> None:
        """Put the pristine weights back, bitwise and without a copy, and the adapters beside them again.

        On a model that was moved or cast since, they are moved and cast as it was. What else was written into W' is lost.

        Raises:
            StateError: not merged, or something was merged later and must be unmerged first.
        """
        if not self.merged or self._pristine is None:
            raise StateError(f"'{self.name}' is not merged.", where=self.name, given="not merged")
        for tower in self.towers.values():
            ledger = open_ledger(tower)
            if (last := ledger.merged[-1]).attachment is not self:
                message = f"'{last.name}' was merged after '{self.name}'. Unmerge it first."
                raise StateError(message, where=self.name, given="merged", expected=last.name)
        merging.unfold(self.towers, self._pristine)
        for tower in self.towers.values():
            open_ledger(tower).merged.pop()
        self._pristine, self.merged = None, False
        self._joined.join_again()

    # looking

    def report(self) -> Report:
        """Per block: sites, trainable, stored, share of the base. `print()` it or read its rows."""
        return Report.of(self)

    def probe(self, sample: Any = None) -> None:
        """One forward and backward pass per tower: every adapter parameter must reach the output.

        Args:
            sample: keyword inputs of the (single) tower, a mapping of component to such, or None for the host's own.
        Raises:
            DeadSite: with the sites that do not.
        """
        probe(self, sample)

    def __repr__(self) -> str:
        state = "merged" if self.merged else ("attached" if self._joined.seams else "detached")
        return f"<Attachment '{self.name}': {self.method.name} at {len(self.parts)} sites, scale {self._scale}, {state}>"
