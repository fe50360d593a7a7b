"""Time and memory of a training step of LoRA variants: each compared with the floor, veneer's LoRA, and peft's implementation.

On a ViT-S/16 with every linear layer of its blocks, and on the UNet with every attention projection. The methods of a row share
the tensors of one frozen base, and each has as many trainable parameters as peft's at the same layers.

Lower bounds, in addition to a frozen layer's 4·d_in·d_out operations per token, forward and backward: LoRA multiplies each token
by A and B, 6·r·(d_in + d_out) operations, and reads and writes y once more. DoRA does that, and reads y again for the gradient of
m. (IA)³ writes y once more forward, and reads it and its gradient backward. LoKr multiplies by C and D, and OFT each block of x
by its R: 6·d_in·b instead of LoRA's. LoHa has no product with x of a rank below r²: where that costs more than W it builds W',
6·r·d_in·d_out operations more in each step, independent of the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from veneer.injection import attach

from . import peers
from .denoiser import Floor, inputs, step
from .interleaved_timing import Contender, Contest
from .shapes import Shape, place, sharing, unet, vit

VIT_WHERE = ("attn.qkv", "attn.out", "mlp")
"""Every linear layer of a block, as a veneer selection."""

VIT_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
"""The same for peft: a pattern of module names."""

FACTOR = 8
"""LoKr's factor."""


@dataclass(frozen=True)
class MethodOptions:
    """A method with the options of both libraries.

    Args:
        options: of veneer's method. `peft`: name of peft's config, and `peft_options` its options beside the targets.
        to: what its step is compared with beside peft's: `veneer lora` or `floor`.
    """

    options: dict[str, Any]
    peft: str
    peft_options: dict[str, Any] = field(default_factory=dict)
    to: str = "veneer lora"


def kinds(rank: int, block: int) -> dict[str, MethodOptions]:
    """The compared methods by name. LoHa has twice LoRA's parameters at a rank, the others depend on their own options.

    Args:
        block: side of OFT's blocks. peft's OFT is its default, in which R is a series of five terms; veneer's is exact.
    """
    lora = {"r": rank, "lora_alpha": rank}
    return {
        "lora": MethodOptions({"rank": rank}, "LoraConfig", lora, "floor"),
        "dora": MethodOptions({"rank": rank}, "LoraConfig", {**lora, "use_dora": True}),
        "lokr": MethodOptions(
            {"factor": FACTOR, "rank": rank}, "LoKrConfig", {"r": rank, "alpha": rank, "decompose_factor": FACTOR}
        ),
        "loha": MethodOptions({"rank": rank}, "LoHaConfig", {"r": rank, "alpha": rank}),
        "oft": MethodOptions({"block_size": block}, "OFTConfig", {"oft_block_size": block}),
        "ia3": MethodOptions({"inputs": ()}, "IA3Config", {"feedforward_modules": []}, "floor"),
    }


def contests(shape: Shape, rank: int, dtype: torch.dtype, seed: int) -> list[Contest]:
    """Contests of time and memory on each of the two models.

    Args:
        rank: of LoRA, DoRA, LoHa and LoKr. `dtype`: of the frozen base; adapters are float32.
    Raises:
        BenchError: veneer and peft have different numbers of trainable parameters.
    """
    size = f"rank {rank}, LoKr's factor {FACTOR}, OFT's blocks of {shape.block}, {str(dtype).removeprefix('torch.')}"
    methods = kinds(rank, shape.block)
    transformer, denoiser = vit(shape.vit, dtype, seed), unet(shape.unet, shape.latent, dtype, seed)
    side, batch = transformer.patch_embed.img_size[0], shape.images
    images = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed)).to(place(), dtype)
    vit_data = (images,), torch.zeros(batch, transformer.num_classes, device=place())
    unet_data = inputs(shape, dtype, seed)
    denoiser_peers = peers.where(denoiser), peers.targets(denoiser)
    return [
        *_on(
            transformer,
            "ViT",
            VIT_WHERE,
            VIT_TARGETS,
            methods,
            vit_data,
            f"{shape.vit}, all linear layers, batch {batch}, {size}",
        ),
        *_on(
            denoiser, "UNet", *denoiser_peers, methods, unet_data, f"UNet, attention projections, {shape.latent}² latents, {size}"
        ),
    ]


def _on(
    base: nn.Module,
    name: str,
    where: tuple[str, ...],
    targets: str | list[str],
    methods: dict[str, MethodOptions],
    data: Any,
    what: str,
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
    memory_pairs = [pair for pair in pairs if pair[1].startswith("peft")] or pairs
    return [
        Contest(f"step, {name}", what, ways, (*pairs, *floor)),
        Contest(f"peak memory of a step, {name}", what, ways, tuple(memory_pairs), unit="MB"),
    ]
