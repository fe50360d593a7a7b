"""FacT-TT and FacT-TK beside their authors' forward passes of a timm ViT."""

from __future__ import annotations

from typing import Any

import timm

from tests.parity.measure import Links, Reader, Row, measure
from tests.parity.models import DEPTH, WIDTH, images, perturb_trained, vits
from tests.parity.oracle import Repository
from veneer.injection import Attachment, attach

ORACLE = Repository("JieShibo/PETL-ViT", "026e4f12cfbe1e46bfb4d3ed5ba09f2d9f83e91e")
METHODS = ("fact",)
RANK, SCALE = 5, 0.7
NAMES = {"q": "attn.q", "k": "attn.k", "v": "attn.v", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def rows() -> list[Row]:
    """TT at all sites, TK at those of the attention, and the difference of TK's MLPs."""
    text = (
        f"TK in the MLPs: the authors' reshape mixes the tiles of Σ, with which outputs differ by {_tucker(mlps=True):.1e}; "
        "veneer's tiles are the paper's. P of TK is initialized over all sites together."
    )
    return [
        Row("fact", "TT on a ViT: outputs, gradients", _tensor_train(), deviations=text),
        Row("fact", "TK, attention of a ViT: outputs, gradients", _tucker(mlps=False)),
    ]


def _oracle(path: str, model: Any) -> None:
    """Puts the authors' factors and forward passes into a model."""
    swaps = {"timm.models.layers.mlp.Mlp": "timm.layers.mlp.Mlp", "nn.Linear(768, dim": f"nn.Linear({WIDTH}, dim"}
    code = ORACLE.definitions(
        path, "fact_forward_attn", "fact_forward_mlp", "set_FacT", timm=timm, vit=model,
        replace={**swaps, "nn.Linear(dim, 768": f"nn.Linear(dim, {WIDTH}"},
    )  # fmt: skip
    code.set_FacT(model, RANK, SCALE)
    perturb_trained(model)
    model.eval()


def _shared(tuned: Attachment, theirs: Any, tucker: bool) -> Links:
    factors: Any = next(iter(tuned.parts.values()))[1].shared
    links: Any = [
        (factors.U[str(WIDTH)], lambda read: read(theirs.FacTu.weight)),
        (factors.V[str(WIDTH)], lambda read: read(theirs.FacTv.weight)),
    ]
    # the authors' core acts on rows, x U C, ours on columns
    return [*links, (factors.C, lambda read: read(theirs.FacTc).transpose(0, 1))] if tucker else links


def _tensor_train() -> float:
    model, theirs = vits()
    _oracle("FacT/fact_tt.py", theirs)
    tuned = attach(model, "fact", rank=RANK, scale=SCALE)

    def core(depth: int, name: str) -> Any:
        block = theirs.blocks[depth]
        linear = getattr(block.mlp if name.startswith("fc") else block.attn, f"{name}_FacTs")
        return lambda read: read(linear.weight)

    sites: Any = [
        (tuned.parts[f"blocks.{d}.{ours}"][1].sigma, core(d, name)) for d in range(DEPTH) for name, ours in NAMES.items()
    ]
    return measure(lambda: model(images()), lambda: theirs(images()), [*_shared(tuned, theirs, False), *sites])


def _tucker(mlps: bool) -> float:
    """With `mlps` the outputs alone, because the two functions differ there."""
    model, theirs = vits()
    _oracle("FacT/fact_tk.py", theirs)
    if not mlps:
        for block in theirs.blocks:
            del block.mlp.forward
    tuned = attach(model, "fact", form="tk", rank=RANK, scale=SCALE, **({} if mlps else {"where": "attn"}))
    sites: Any = []
    starts = {"q": 0, "k": 1, "v": 2, "proj": 3, "fc1": 4, "fc2": 8}
    for depth in range(DEPTH):
        for name, start in starts.items():
            size = 4 if name.startswith("fc") else 1
            if f"blocks.{depth}.{NAMES[name]}" in tuned.parts:
                sites.append((tuned.parts[f"blocks.{depth}.{NAMES[name]}"][1].P, _columns(theirs, 12 * depth + start, size)))
    links = [*_shared(tuned, theirs, True), *sites]
    run = (lambda: model(images()), lambda: theirs(images()))
    return measure(*run, links) if not mlps else measure(*run, links, gradients=False)


def _columns(theirs: Any, start: int, size: int) -> Any:
    def read_columns(read: Reader) -> Any:
        return read(theirs.FacTp)[:, start : start + size]

    return read_columns
