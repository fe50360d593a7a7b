"""How many numbers methods train, against what their papers and their authors' code have.

`python -m tests.hosts.published_counts` writes docs/results/counts.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import veneer
from tests.hosts import published

PAGE = Path("docs/results/counts.md")
HEAD = """# Trained numbers, against published ones

Each line was counted by attaching the method to the model on the meta device. Heads are excluded. A published number is exact
where it follows from the released code and its settings or from the paper's formula, and rounded where a table has it; then ours
is equal if it rounds to the same.
Methods that are not here (E2VPT, Mona, SCT, ARC, GPS, Consolidator, LoRand) have no line.

Made by `python -m tests.hosts.published_counts`; a test keeps the page up to date.
"""
CODE, TABLE = "authors' code", "paper"
BENCH = "V-PETL Bench"
FORMULA = "paper's formula"
SWIN_WIDTHS = [128] * 2 + [256] * 2 + [512] * 18 + [1024] * 2
LINEARS = ("attn.qkv", "attn.out", "mlp")
MODELS = {
    "ViT-B/16": "timm `vit_base_patch16_224`",
    "Swin-B": "timm `swin_base_patch4_window7_224`",
    "CLIP ViT-B/16": "open_clip `ViT-B-16`, as a classifier of 1,000 classes",
    "CLIP RN50": "open_clip `RN50`, as a classifier of 1,000 classes",
    "SD 1.5": "diffusers' `UNet2DConditionModel`, of Stable Diffusion 1.5",
    "SDXL": "the same, of SDXL",
}


@dataclass(frozen=True)
class Count:
    """One published number.

    Args:
        published: exact, or rounded as text (`0.33 M`).
        source: where it is from. `where`, `options`: how the method is attached to mean the same.
        why: the reason, where ours is another number. `train`: base weights that are trained as well.
    """

    method: str
    model: str
    published: int | str
    source: str = CODE
    where: str | tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    train: tuple[str, ...] = ()

    def equal(self, ours: int) -> bool:
        """True if `ours` is the published number, as exactly as that is given."""
        if isinstance(self.published, int):
            return ours == self.published
        digits = self.published.removesuffix(" M")
        return f"{ours / 1e6:.{len(digits.partition('.')[2])}f}" == digits


def _vit(method: str, published: int | str, source: str = CODE, where: Any = None, why: str = "", **options: Any) -> Count:
    return Count(method, "ViT-B/16", published, source, where, options, why)


VIT = [
    _vit("full", 85_798_656, "released weights"),
    _vit("bitfit", 102_912),
    _vit("bitfit", "0.10 M", BENCH),
    _vit("bitfit", 82_944, FORMULA, where=("bias.attn", "bias.mlp")),
    _vit("bitfit", 46_080, FORMULA, where=("bias.attn.q", "bias.mlp.in")),
    _vit("norm_tuning", 36_864, FORMULA),
    _vit("norm_tuning", 38_400, FORMULA, where=("norm", "bias.norm")),
    _vit("ssf", 205_824),
    _vit("vpt", 460_800, tokens=50),
    _vit("vpt", 92_160, tokens=10),
    _vit("vpt", 57_600, tokens=10, project=64),
    _vit("vpt", 38_400, where="tokens.tower", tokens=50),
    _vit("vpt", 15_360, where="tokens.tower", tokens=20),
    _vit("evp", 69_840, where="pixels"),
    _vit("dam_vp", 69_840, clusters=1),
    _vit("ilm_vp", 101_376, FORMULA, where="pixels"),
    _vit("ilm_vp", 150_528, where="pixels", why="the code holds δ in the middle of the picture as well, where it has no effect"),
    _vit("adaptformer", 1_189_632),
    _vit("adaptformer", "1.19 M", BENCH),
    _vit("adaptformer", 599_424, bottleneck=32),
    _vit("adaptformer", 156_768, bottleneck=8),
    _vit("adaptformer", "0.16 M", "Convpass' paper", bottleneck=8),
    _vit("adaptformer", 27_660, bottleneck=1),
    *(
        _vit("adapter_plus", number, bottleneck=h)
        for h, number in {1: 36_876, 2: 55_320, 4: 92_208, 8: 165_984, 16: 313_536, 32: 608_640}.items()
    ),
    _vit("convpass", 327_552),
    _vit("convpass", "0.33 M", TABLE),
    _vit("convpass", 163_776, where="attn"),
    _vit("convpass", "0.16 M", TABLE, where="attn"),
    _vit("repadapter", 239_808),
    _vit("repadapter", 221_184, FORMULA, bias=False),
    _vit("repadapter", "0.22 M", TABLE, bias=False),
    _vit("houlsby", 2_379_264, FORMULA),
    _vit("houlsby", 1_789_056, FORMULA, bottleneck=48),
    _vit("houlsby", 313_536, FORMULA, bottleneck=8),
    _vit("pfeiffer", 894_528, FORMULA),
    _vit("pfeiffer", 156_768, FORMULA, reduction=96),
    _vit("fact", 61_440, rank=16),
    _vit("fact", 21_504, rank=8),
    _vit("fact", 86_528, form="tk", rank=32),
    _vit("fact", 30_976, form="tk", rank=16),
    _vit("dtl", 36_864),
    _vit("dtl", "0.04 M", TABLE),
    _vit("dtl", 43_776, conv=3),
    _vit("dtl", 56_064, conv=5),
    _vit("lst", "2.38 M", BENCH),
    _vit("lora", 294_912, FORMULA, where="attn.{q,v}", rank=8),
    _vit("lora", 294_912, FORMULA, where="attn.qkv", rank=8),
    _vit("lora", "0.29 M", BENCH, where="attn.{q,v}", rank=8),
    _vit("lora", 147_456, FORMULA, where="attn.qkv", rank=4),
    _vit("lora", 589_824, FORMULA, where="attn.qkv", rank=16),
    _vit("lora", 1_179_648, FORMULA, where=LINEARS, rank=8),
    _vit("lora_fa", 147_456, FORMULA, where="attn.{q,v}", rank=8),
    _vit("lora_fa", 221_184, FORMULA, where="attn.qkv", rank=8),
    _vit("lora_fa", 663_552, FORMULA, where=LINEARS, rank=8),
    _vit("adalora", 442_512, FORMULA, where="attn.qkv", rank=12, target_rank=8),
    _vit("adalora", 1_770_048, FORMULA, where=LINEARS, rank=12, target_rank=8),
    _vit("dora", 322_560, FORMULA, where="attn.qkv", rank=8),
    _vit("dora", 1_262_592, FORMULA, where=LINEARS, rank=8),
    _vit("vera", 30_720, FORMULA, where="attn.qkv", rank=256),
    _vit("vera", 24_576, FORMULA, where="attn.{q,v}", rank=256),
    _vit("vera", 95_232, FORMULA, where=LINEARS, rank=256),
    _vit("ia3", 55_296, FORMULA),
]
SWIN = [
    Count("norm_tuning", "Swin-B", "0.06 M", BENCH, ("norm", "bias.norm")),
    Count("convpass", "Swin-B", sum(2 * (2 * w * 8 + 8 + w + 8 * 8 * 9 + 8) for w in SWIN_WIDTHS)),
    Count("dtl", "Swin-B", sum(2 * 4 * w for w in SWIN_WIDTHS[4:]), CODE, "block@4:24", {"rank": 4, "write_from": 14}),
]
CLIP = [
    Count("coop", "CLIP RN50", 8_192),
    Count("coop", "CLIP ViT-B/16", 8_192),
    Count("coop", "CLIP RN50", "8.19 M", FORMULA, options={"by_class": True}),
    Count("cocoop", "CLIP ViT-B/16", 35_360),
    Count("clip_adapter", "CLIP RN50", 524_288),
    Count("clip_adapter", "CLIP ViT-B/16", 131_072, FORMULA),
    Count("tip_adapter", "CLIP RN50", 0, options={"shots": 16}),
    Count("tip_adapter", "CLIP RN50", 16 * 1000 * 1024, options={"shots": 16, "train_keys": True}),
    Count("bitfit", "CLIP ViT-B/16", 171_008, FORMULA),
]
OUTPUTS = ("attn.out", "xattn.out")
CONTROL = [
    Count("controlnet", "SD 1.5", 361_279_120),
    Count("controlnet", "SDXL", 1_251_014_160, "diffusers"),
    Count("t2i_adapter", "SD 1.5", 77_369_280),
    Count("t2i_adapter", "SD 1.5", "77 M", TABLE),
    Count("t2i_adapter", "SD 1.5", 18_689_200, "diffusers", options={"kind": "light"}),
    Count("t2i_adapter", "SD 1.5", "18 M", TABLE, options={"kind": "light"}, why="18,689,200 is cut, not rounded"),
    Count("t2i_adapter", "SDXL", 79_028_160, "diffusers"),
    Count("ip_adapter", "SD 1.5", 22_319_616),
    Count("ip_adapter", "SD 1.5", "22 M", TABLE),
    Count("ip_adapter", "SD 1.5", 49_087_488, options={"kind": "plus", "width": 1280}),
    Count("ip_adapter", "SDXL", 351_285_248, options={"width": 1280}),
    Count("ip_adapter", "SDXL", 423_748_864, options={"kind": "plus", "width": 1280}),
    Count("controlnext", "SD 1.5", 3_526_400),
    Count("controlnext", "SD 1.5", 28_332_160, train=OUTPUTS),
]
COUNTS = [*VIT, *SWIN, *CLIP, *CONTROL]


@functools.cache
def build(model: str) -> nn.Module:
    """A published model on the meta device."""
    if model in ("SD 1.5", "SDXL"):
        with torch.device("meta"):
            return published.BUILDERS["sd15" if model == "SD 1.5" else "sdxl"]()
    return _clip(model) if model.startswith("CLIP") else _timm(MODELS[model].partition("`")[2].rstrip("`"))


def _timm(architecture: str) -> nn.Module:
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(architecture, pretrained=False, num_classes=0)
    return model


def _clip(model: str) -> nn.Module:
    import open_clip

    from veneer.models.clip_classifier import CLIPClassifier

    name = model.removeprefix("CLIP ").replace("/", "-")
    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config(name))
    return CLIPClassifier(clip, open_clip.get_tokenizer(name), [f"class {i}" for i in range(1000)])


def trained(count: Count) -> int:
    """How many numbers the method trains."""
    tuned = veneer.attach(build(count.model), count.method, where=count.where, train=count.train, **count.options)
    try:
        return sum({id(p): p.numel() for p in tuned.parameters()}.values())
    finally:
        tuned.detach()


def page() -> str:
    """The Markdown."""
    lines = ["| method | options | model | published | source | ours | |", "|---|---|---|--:|---|--:|---|"]
    for count in COUNTS:
        ours = trained(count)
        said = "equal" if count.equal(ours) else count.why or "differs"
        published = f"{count.published:,}" if isinstance(count.published, int) else count.published
        lines.append(
            f"| `{count.method}` | {_options(count)} | {count.model} | {published} | {count.source} | {ours:,} | {said} |"
        )
    models = [f"- {model}: {what}" for model, what in MODELS.items()]
    return "\n".join([HEAD, *models, "", *lines, ""])


def _options(count: Count) -> str:
    where = (count.where,) if isinstance(count.where, str) else count.where or ()
    words = [f"`where={' '.join(where)}`"] if where else []
    words += [f"`train={' '.join(count.train)}`"] if count.train else []
    return " ".join([*words, *(f"`{key}={value}`" for key, value in count.options.items())])


if __name__ == "__main__":
    PAGE.write_text(page())
