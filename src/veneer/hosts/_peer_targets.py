"""Which modules LoRA trains by default in diffusers' training scripts and in peft, by the class of the model.

Source: `target_modules` of `examples/dreambooth/train_dreambooth_lora*.py` of diffusers, and of peft's
`TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING` for T5. Neither has defaults for timm and open_clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from veneer.injection.module_patterns import module_patterns
from veneer.injection.select import select
from veneer.injection.sites import WeightSite
from veneer.injection.towers import towers_of

_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
_JOINT = ("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0")
_ADDED = ("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_FLUX2 = (*_ATTENTION, "to_qkv_mlp_proj", r"single_transformer_blocks\.\d+\.attn\.to_out")
_KREA2 = ("img_in", "final_layer.linear", *_ATTENTION, "to_gate", "ff.up", "ff.down", "text_fusion.projector",
          "txt_in.linear_1", "txt_in.linear_2", "time_embed.linear_1", "time_embed.linear_2", "time_mod_proj")  # fmt: skip
_DREAMBOOTH = "train_dreambooth_lora{}.py of diffusers"
DEFAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "UNet2DConditionModel": (_ATTENTION, "train_text_to_image_lora.py of diffusers"),
    "CLIPTextModel": (("q_proj", "k_proj", "v_proj", "out_proj"), _DREAMBOOTH.format("")),
    "CLIPTextModelWithProjection": (("q_proj", "k_proj", "v_proj", "out_proj"), _DREAMBOOTH.format("_sdxl")),
    "T5EncoderModel": (("q", "v"), "peft"),
    "SD3Transformer2DModel": ((*_ADDED, *_JOINT), _DREAMBOOTH.format("_sd3")),
    "FluxTransformer2DModel": ((*_JOINT, *_ADDED, *_FEED_FORWARD), _DREAMBOOTH.format("_flux")),
    "Flux2Transformer2DModel": (_FLUX2, _DREAMBOOTH.format("_flux2")),
    "SanaTransformer2DModel": (("to_k", "to_q", "to_v"), _DREAMBOOTH.format("_sana")),
    "ZImageTransformer2DModel": (_ATTENTION, _DREAMBOOTH.format("_z_image")),
    "QwenImageTransformer2DModel": (_ATTENTION, _DREAMBOOTH.format("_qwen_image")),
    "Lumina2Transformer2DModel": (_ATTENTION, _DREAMBOOTH.format("_lumina2")),
    "HiDreamImageTransformer2DModel": (("to_k", "to_q", "to_v", "to_out"), _DREAMBOOTH.format("_hidream")),
    "Krea2Transformer2DModel": (_KREA2, _DREAMBOOTH.format("_krea2")),
}
"""Class of the model to the targets and where they come from."""


@dataclass(frozen=True)
class PeerTargets:
    """Default targets of one tower.

    Args:
        component: its attribute in the pipeline, or "". `model`: its class.
        targets: values for `--target-modules`; empty if peers have no default. `source`: the peer.
        modules: number of modules that they match.
    """

    component: str
    model: str
    targets: tuple[str, ...]
    source: str
    modules: int

    def __str__(self) -> str:
        name = f"{self.component}, {self.model}" if self.component else self.model
        if not self.targets:
            return f"{name}: no default in diffusers' scripts or peft"
        quoted = " ".join(f"'{target}'" if "\\" in target else target for target in self.targets)
        return f"{name}: {self.modules} modules, as in {self.source}\n  --target-modules {quoted}"


def peer_targets(model: Any) -> list[PeerTargets]:
    """Default targets of peers for each tower of a model or pipeline.

    Raises:
        UnsupportedSite: no host matches the model.
    """
    result = []
    for tower in towers_of(model):
        name = type(tower.module).__name__
        targets, source = DEFAULTS.get(name, ((), ""))
        layers = [site for site in tower.sites if isinstance(site, WeightSite)]
        labels = frozenset(site.tower for site in tower.sites)
        matches = select(layers, module_patterns(targets), labels, strict=False) if targets else []
        result.append(PeerTargets(tower.component, name, targets, source, len({site.path for site in matches})))
    return result
