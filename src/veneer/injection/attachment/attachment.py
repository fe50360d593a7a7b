"""`Attachment`: the handle that `attach` returns, for one method on one model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ..composition.current_task import CurrentTask, example_task
from ..composition.merge import MergeReport, host_tensors
from ..conditions import Conditions
from ..errors import StateError
from ..method import Adapter
from ..seams.seam import Seam
from ..sites import Site
from .condition_scope import condition_scope, parse_conditions
from .extra_parameters import ExtraParameters
from .files import file_functions
from .installation import Installation
from .plan import Plan
from .probe import probe
from .report import Report
from .state_dict import LoadReport, load_state, state_of
from .training_hooks import TrainingHooks, allow_unselected


class Attachment(TrainingHooks, CurrentTask):
    """One method on one model: its sites and adapters, and the operations on them.

    Attributes:
        name: unique among the model's attachments. `method`: the config. `where`: the selection as given.
        parts: site name to (site, adapter).
        merged: True while merged into the weights.
        is_enabled: False in `enabled(False)` and while `activate` selects others.
        seams: hooks and parametrizations on the host, empty when detached. `trained`: base parameters selected by `train`.
        conditions: conditions of the current `condition` scope, or None.
        pipeline: a weak reference to the pipeline passed to `attach`, or None.
        loaded: the report of the file it was loaded from, or None. `provenance`: origin of the adapters, saved with them.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self.name = name
        self.method = plan.method
        self.where = plan.where
        self.train = plan.train
        self.towers = plan.towers
        self.parts: dict[str, tuple[Site, Adapter]] = {s.name: (s, a) for s, a in plan.parts}
        self.supported_sites = plan.supported_sites
        self.extras: dict[str, tuple[str, str]] = plan.extras
        self.merged = False
        self.loaded: LoadReport | None = None
        self.provenance: dict[str, Any] = {}
        self._installation = Installation(self, plan)
        self.seams: list[Seam] = self._installation.seams
        self.trained: ExtraParameters = self._installation.trained
        self.conditions: Conditions | None = None
        self.pipeline: Any = None
        self._scale, self.is_enabled = 1.0, True

    # detach, and state of the host

    def detach(self) -> None:
        """Removes the adapters and restores the model bitwise.

        That includes state-dict keys and their order, module types, hooks, `requires_grad`, norm statistics and outputs.

        Raises:
            StateError: it is merged (call `unmerge` first) or already detached.
            HostChanged: it parametrizes weights of a model that is sharded.
        """
        self._installation.refuse_mixed()
        if self.merged:
            raise StateError(f"'{self.name}' is merged. Call unmerge() before detach().", where=self.name, given="merged")
        if not self.seams:
            raise StateError(f"'{self.name}' is already detached.", where=self.name, given="detached")
        self._installation.reject_sharded_weights()
        if self._installation.composition is not None:
            self._installation.composition.undo()
        self._installation.uninstall()

    def check(self) -> None:
        """Raises if the host was rebuilt or fused since attach, so that adapters would be bypassed.

        Raises:
            HostChanged: with the site and the change.
        """
        if not self.seams:
            raise StateError(f"'{self.name}' is detached.", where=self.name, given="detached")
        self._installation.check(self.merged)

    def host_state_dict(self, component: str = "") -> dict[str, Tensor]:
        """State dict of the host without adapters, with its original keys in their order, also for parametrized tensors.

        Args:
            component: component of a pipeline, such as `unet` (default: the first that is adapted).
        """
        tower = self.towers[component or next(iter(self.towers))]
        return dict(host_tensors(tower))

    # parameters and state

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the adapters, and base parameters selected by `train`."""
        yield from (p for _, p in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Pairs of `site-name:parameter` and parameter, in site order; shared parameters once."""
        seen: set[int] = set()
        for name, (_, adapter) in self.parts.items():
            for key, p in adapter.named_parameters():
                if id(p) not in seen:
                    seen.add(id(p))
                    yield f"{name}:{key}", p
        yield from self.trained.items()

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: those of the method, and one for `train`."""
        groups = self.method.groups(list(self.parts.values()))
        extra = [p for _, p in self.trained.items()]
        return [*groups, {"params": extra, "lr_scale": 1.0}] if extra else groups

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changed, under `site-name:parameter`, norm statistics of the host included."""
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> LoadReport:
        """Loads the tensors of `state_dict`.

        Args:
            assign: as in torch, tensors become parameters in their own dtype instead of being copied into these.
        Raises:
            LoadError: `strict`, and a tensor is missing, unused or has another shape; nothing is changed then.
        """
        return load_state(self, state, strict, assign)

    def swap(self, path: str | PathLike[str], *, base: Literal["same", "any"] = "same") -> LoadReport:
        """Loads another adapter file into this attachment in place: no hook, shape or compiled graph changes.

        The outputs equal those of `veneer.load` with this file, at the same `scale`. LoRA, DoRA, LoHa, LoKr and OFT accept
        files of a lower rank, another alpha or smaller blocks, exactly, and files without some of the sites: adapters of those
        sites are set to no change. Other methods need the same options and sites. After a swap to a smaller file, the padding
        zeros do not train.

        Args:
            path: a file of any format with a single attachment of this method; others in it are ignored.
            base: as for `veneer.load`.
        Raises:
            LoadError: the file is not compatible. StateError: merged or detached. Nothing is changed then.
        """
        return file_functions().swap(self, path, base=base)

    def save(self, path: str | PathLike[str]) -> Path:
        """Writes the native file (the suffix `.safetensors` is added). Returns its path."""
        self.check()
        return file_functions().save(self, path)

    # conditions and scale

    def condition(
        self, *, strength: float = 1.0, start: float = 0.0, end: float = 1.0, pipeline: Any = None, **conditions: Any
    ) -> AbstractContextManager[None]:
        """Sets the conditions for forward passes inside a `with` block; the previous ones are restored after it.

        Pipelines are called without changes: with guidance, several prompts and several images per prompt. A single condition
        applies to all samples, the n-th of several to the n-th prompt. With gradient checkpointing, call `backward()` before the
        next call.

        Args:
            strength: multiplies `scale`, inside the block only. `start`, `end`: active part of the schedule, 0 to 1.
            pipeline: the pipeline or model that is called, if not the one passed to `attach`.
            conditions: conditions of the method, such as `image=`.
        Raises:
            ConditionError: the method does not take these conditions, or a value is invalid.
        """
        return condition_scope(self, parse_conditions(self, conditions, strength, start, end, pipeline))

    @property
    def scale(self) -> float:
        """Strength: 0 is the host, 1 the adapter as trained. Setting it writes a buffer, without recompilation."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        if self.merged:
            message = f"'{self.name}' is merged at scale {self._scale}. Call unmerge() before changing it."
            raise StateError(message, where=self.name, given="merged")
        self._write(float(value), self.is_enabled)

    @contextlib.contextmanager
    def enabled(self, on: bool) -> Iterator[None]:
        """Enables or disables the adapters inside a `with` block; the previous state is restored after it."""
        if self.merged:
            raise StateError(f"'{self.name}' is merged. Call unmerge() before enabled().", where=self.name, given="merged")
        before = self.is_enabled
        self._write(self._scale, on)
        try:
            yield
        finally:
            self._write(self._scale, before)

    def _write(self, scale: float, on: bool) -> None:
        strength = scale if on else 0.0
        for seam in self.seams:
            seam.check_strength(strength)
        for seam in self.seams:
            seam.write_strength(strength)
        self._scale, self.is_enabled = scale, on

    # merging into weights

    def merge(self, *, requantize: bool = False) -> MergeReport:
        """Merges the adapters into the base weights: W' = weight(W) at the current scale, rounded once to W's dtype.

        Memory: W is kept for `unmerge`, so each merge needs the memory of the adapted weights again.
        Order: attachments are applied in the order of merging, and unmerged ones after them. Outputs do not change if they are
        merged in the order of attaching, or if all of them add a delta, as LoRA does. `veneer.merges(model)` lists the merged
        attachments in order, with their scales.

        Args:
            requantize: merge into quantized weights too: dequantize, merge, and quantize again. This rounds away a part of the
                update; `MergeReport.rounding` has the error of each layer. Only for layers that veneer quantized.
        Raises:
            StateError: already merged, or detached.
            UnsupportedSite: the method has no weight form, or a weight is quantized, offloaded or computed from others.
            Nothing is changed then.
        """
        self._installation.refuse_mixed()
        if self.merged:
            raise StateError(f"'{self.name}' is already merged.", where=self.name, given="merged")
        self._installation.refuse_composed("merge")
        self.check()
        return self._installation.merge(self._scale if self.is_enabled else 0.0, requantize)

    def unmerge(self) -> None:
        """Restores the original weights, bitwise and without a copy, and reinstalls the adapters.

        If the model was moved or cast since the merge, so are the weights. Other changes of W' since the merge are lost.

        Raises:
            StateError: not merged, or a later merge of another attachment must be undone first.
        """
        if not self.merged:
            raise StateError(f"'{self.name}' is not merged.", where=self.name, given="not merged")
        self._installation.unmerge()

    # inspection

    def report(self) -> Report:
        """Adapted roles and trainable parameters per block, and their share of the base model. Print it, or read its rows."""
        return Report.of(self)

    def probe(self, sample: Any = None) -> None:
        """Checks with one forward and backward pass per tower that the output depends on every adapter parameter.

        Args:
            sample: keyword inputs of the tower, a mapping of component to keyword inputs, or None for those of the host.
        Raises:
            DeadSite: with the sites whose parameters do not reach the output.
        """
        with allow_unselected(), example_task(self):
            probe(self, sample)

    def __repr__(self) -> str:
        state = "merged" if self.merged else ("attached" if self.seams else "detached")
        return f"<Attachment '{self.name}': {self.method.name} at {len(self.parts)} sites, scale {self._scale}, {state}>"
