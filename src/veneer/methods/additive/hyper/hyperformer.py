"""HyperFormer: adapters of all tasks from a hypernetwork for each kind of branch, or for each branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from veneer.injection.errors import OptionError

from ._hypernetwork import HyperMethod, Layout, layer_of

Generators = Literal["role", "site"]


@dataclass(frozen=True)
class HyperFormer(HyperMethod):
    """y' = y + LN(Up(act(Down(y)))): y a branch; Down, Up and LN are generated from an embedding of the task.

    Each of the six tensors of an adapter (Down and Up with their biases, scale and shift of LN) is a linear function of v. With
    generators by `role`, v = LN(W₂ ReLU(W₁ [z_τ; z_l])) of the embeddings of the task τ and the layer l, and all attention
    branches share one generator, all MLP branches another. With generators by `site`, v = W₂ ReLU(W₁ z_τ), and every branch has
    its own generator, as in the paper. The current task is `attachment.task`; `veneer transfer DATA1 DATA2 … --tasks` sets it in
    each batch, and `veneer predict RUN --task NAME` after training. `attachment.materialize(task)` keeps the adapters of one task
    as ordinary parameters, without the hypernetwork. See `hyperformer_plus_plus` for one generator of all branches.

    Args:
        tasks: names of the tasks; set by `veneer transfer --tasks`.
        reduction: h = width // reduction, at least 1.
        embedding: width of the embeddings of task and layer, at least 1.
        hidden: width of the hidden layer of the hypernetwork, at least 1.
        projected: width of v, at least 1.
        act: activation between Down and Up: `gelu_tanh`, `gelu`, `swish` or `relu`.
        materialized: the adapters have the parameters of their one task; `attachment.materialize` sets it.
        generators: one for each `role` (attention, MLP) or for each `site`.
    Branches of other widths, as in the stages of Swin and ConvNeXt, have their own generators. A layer is a block of one tower.
    Counts: by `role` e (tasks + layers) + 128 (2 e + 1) + 64·129 + 128 for v, and 65 (2·width·h + h + 3·width) for each role and
    width; by `site` e·tasks + 128 (e + 1) + 64·129 for v, and the same for each branch. ViT-B/16 with one task and h = 24
    5,241,200, by `site` 61,213,952.
    Source: Karimi Mahabadi, Ruder, Dehghani, Henderson, Parameter-efficient Multi-task Fine-tuning for Transformers via Shared
    Hypernetworks, ACL 2021, sections 2.2 and 2.3, and the authors' code: initial values as in `hyperformer_plus_plus`. The
    paper's hypernetworks belong to one layer each (`site`), which needs more parameters than most models have to spare; the
    authors' published configuration has those of `role`, the default here. The paper also trains the norms of the model, which is
    `train="norm"` here.
    """

    name: ClassVar[str] = "hyperformer"
    uses: ClassVar[tuple[str, ...]] = ("classification",)
    paper: ClassVar[str] = (
        "Karimi Mahabadi et al., Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks, ACL 2021"
    )

    shared_options: ClassVar[tuple[str, ...]] = (*HyperMethod.shared_options, "generators")

    generators: Generators = "role"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.generators not in get_args(Generators):
            raise OptionError.of(self.name, "generators", self.generators, f"one of {', '.join(get_args(Generators))}")

    @classmethod
    def examples(cls) -> tuple[HyperFormer, HyperFormer]:
        """One task each, with small hypernetworks of both kinds."""
        small: dict[str, Any] = {"reduction": 2, "embedding": 6, "hidden": 8, "projected": 8}
        return cls(("first",), **small), cls(("second",), **small, generators="site")

    def layout(self) -> Layout:
        """Embeddings of layers with a generator for each role, or a generator for each site."""
        if self.generators == "site":
            return Layout(None, None, lambda site: site.name, norm=False)
        return Layout(layer_of, None, lambda site: site.role, norm=True)
