"""The LoRA family's training step and its memory: each method against the frozen floor, veneer's own LoRA, and peft's form of it.

On a ViT-S/16 with every linear layer of its blocks, and on the UNet with every attention projection. A row's methods share one
frozen base, tensor for tensor, and each trains as many numbers as peft's does at the same places.

What they can reach, beside a frozen layer's 4·d_in·d_out operations for a token, forward and backward: LoRA multiplies each
token by A and B, 6·r·(d_in + d_out) operations, and reads and writes y once more. DoRA does that, and reads y again for the
gradient of m. (IA)³ writes y once more forward, and reads it and its gradient backward. LoKr multiplies by C and D, and OFT
each block of x by its R: 6·d_in·b in the place of LoRA's. LoHa has no product with x of a rank under r²: where that is dearer
than W it builds W', 6·r·d_in·d_out operations more in each step, whatever the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from veneer.injection import attach

from . import peers
from .contest import Contender, Contest
from .denoiser import Floor, inputs, step
from .shapes import Shape, place, sharing, unet, vit

VIT_WHERE = ("attn.qkv", "attn.out", "mlp")
"""Every linear layer of a block, in veneer's words."""

VIT_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
"""The same for peft: a pattern of module names."""

FACTOR = 8
"""Of LoKr."""


@dataclass(frozen=True)
class Kind:
    """A method as both train it.

    Args:
        options: of veneer's method. `peft`: name of peft's config, and `peft_options` its options beside the targets.
        to: what its step is compared with beside peft's: `veneer lora` or `floor`.
    """

    options: dict[str, Any]
    peft: str
    peft_options: dict[str, Any] = field(default_factory=dict)
    to: str = "veneer lora"


def kinds(rank: int, block: int) -> dict[str, Kind]:
    """Method to how it is compared; LoHa has twice LoRA's numbers at a rank, the others what their own settings give.

    Args:
        block: side of OFT's blocks. peft's OFT is its default, in which R is a series of five terms; veneer's is exact.
    """
    lora = {"r": rank, "lora_alpha": rank}
    return {
        "lora": Kind({"rank": rank}, "LoraConfig", lora, "floor"),
        "dora": Kind({"rank": rank}, "LoraConfig", {**lora, "use_dora": True}),
        "lokr": Kind({"factor": FACTOR, "rank": rank}, "LoKrConfig", {"r": rank, "alpha": rank, "decompose_factor": FACTOR}),
        "loha": Kind({"rank": rank}, "LoHaConfig", {"r": rank, "alpha": rank}),
        "oft": Kind({"block_size": block}, "OFTConfig", {"oft_block_size": block}),
        "ia3": Kind({"inputs": ()}, "IA3Config", {"feedforward_modules": []}, "floor"),
    }


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Time and memory on each of the two models.

    Args:
        rank: of LoRA, DoRA, LoHa and LoKr. `dtype`: of the frozen base; adapters are float32.
    Raises:
        BenchError: veneer and peft would not train the same number of parameters.
    """
    size = f"rank {rank}, LoKr's factor {FACTOR}, OFT's blocks of {shape.block}, {str(dtype).removeprefix('torch.')}"
    methods = kinds(rank, shape.block)
    transformer, denoiser = vit(shape.vit, dtype, seed), unet(shape.unet, shape.latent, dtype, seed)
    side, batch = transformer.patch_embed.img_size[0], shape.images
    pictures = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(place(), dtype)
    seen = (pictures,), torch.zeros(batch, transformer.num_classes, device=place())
    given = inputs(shape, dtype, seed)
    denoiser_peers = peers.where(denoiser), peers.targets(denoiser)
    return [
        *_on(transformer, "ViT", VIT_WHERE, VIT_TARGETS, methods, seen, f"{shape.vit}, all linear layers, batch {batch}, {size}"),
        *_on(denoiser, "UNet", *denoiser_peers, methods, given, f"UNet, attention projections, {shape.latent}² latents, {size}"),
    ]


def _on(
    base: nn.Module, name: str, where: tuple[str, ...], targets: str | list[str], methods: dict[str, Kind], data: Any, what: str
) -> list[Contest]:
    models: dict[str, nn.Module] = {"floor": Floor(base)}
    pairs = []
    for method, kind in methods.items():
        ours = models[f"veneer {method}"] = sharing(base)
        attach(ours, method, where=where, **kind.options)
        pairs.append((f"veneer {method}", kind.to))
        if peers.has_peft():
            theirs = models[f"peft {method}"] = peers.injected(sharing(base), kind.peft, targets, **kind.peft_options)
            peers.check_equal(ours, theirs)
            pairs.append((f"veneer {method}", f"peft {method}"))
    ways = tuple(Contender(way, step(model, *data)) for way, model in models.items())
    floor = [(way, "floor") for way in models if way != "floor" and (way, "floor") not in pairs]
    weighed = [pair for pair in pairs if pair[1].startswith("peft")] or pairs
    return [
        Contest(f"step, {name}", what, ways, (*pairs, *floor)),
        Contest(f"peak memory of a step, {name}", what, ways, tuple(weighed), unit="MB"),
    ]
