"""LoRA files of diffusion transformers as other tools write them, at the sizes of tiny models, and their ΔW.

The names are those of the tools, not of this package: of musubi-tuner `networks/lora_zimage.py`, `lora_flux_2.py`,
`lora_qwen_image.py`, `lora_krea2.py`, `lora_wan.py`, `lora.py` and `convert_z_image_lora_to_comfy.py`; of sd-scripts
`networks/lora_flux.py`, `lora_lumina.py`, `lora_sd3.py`; of ai-toolkit `extensions_built_in/diffusion_models`,
`toolkit/lora_special.py`; of OneTrainer `modules/modelSaver`, `modules/model`, `modules/util/convert_lora_util.py`; of
diffusers' `loaders/lora_conversion_utils.py`; of ComfyUI `comfy/lora.py`, `comfy/utils.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor

from veneer.hosts.diffusers_dit import DiffusersDiT

KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
PEFT = ("lora_A.weight", "lora_B.weight", "")
PEFT_ALPHA = ("lora_A.weight", "lora_B.weight", "alpha")
LUMINA = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 36, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 6,
    "num_kv_heads": 2, "multiple_of": 4, "axes_dim_rope": (2, 2, 2), "axes_lens": (16, 8, 8), "cap_feat_dim": 20,
}  # fmt: skip
"""The tiny model of the host, but with three times as many queries as keys, as in the published one."""
SD3 = {
    "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8, "patch_size": 2, "in_channels": 4,
    "joint_attention_dim": 24, "pooled_projection_dim": 20, "caption_projection_dim": 16, "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
}  # fmt: skip
MODELS = {
    "lumina2": (diffusers.Lumina2Transformer2DModel, LUMINA),
    "sd35_medium": (diffusers.SD3Transformer2DModel, {**SD3, "dual_attention_layers": (0, 1)}),
    "sd35_large": (diffusers.SD3Transformer2DModel, {**SD3, "num_attention_heads": 3, "caption_projection_dim": 24}),
}
"""Tiny models beside those of the host. SD 3.5 has a second attention in its first blocks (medium) or more heads (large)."""
SCALE = {"chroma": 192, "lumina2": 64}
"""Widths of the published models, which diffusers' converters assume, over those of the tiny ones."""
Modules = Mapping[str, str]
"""Module of a block in the file -> diffusers' modules of its rows, separated by spaces."""


@dataclass(frozen=True)
class Peer:
    """The files of one tool for one family.

    Args:
        family: tiny model. `tool`: for the test's name.
        prefix: of the names, `lora_unet_` and others that end in `_` with underscores for dots. `ends`: key suffixes.
        blocks: list of blocks in the file and in diffusers -> modules of each block. `modules`: modules outside of the blocks.
        form: veneer's format. `mixin`: diffusers' loader, if it reads the files.
        is_written: veneer writes the same keys and tensors. `round_trip`: the format in which it is written, if not `form`.
    """

    family: str
    tool: str
    prefix: str
    ends: tuple[str, str, str]
    blocks: Mapping[tuple[str, str], Modules]
    form: str
    mixin: str = ""
    modules: Modules | None = None
    is_written: bool = False
    round_trip: str = ""

    def file(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of a file for a model, and ΔW by diffusers' path."""
        names = dict(self.modules or {})
        for (first, own), modules in self.blocks.items():
            for i, block in enumerate(model.get_submodule(own)):
                for name, paths in modules.items():
                    if all(_has(block, path) for path in paths.split()):
                        names[f"{first}.{i}.{name}"] = " ".join(f"{own}.{i}.{path}" for path in paths.split())
        state: dict[str, Tensor] = {}
        changes: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(len(self.tool))
        for number, (name, paths) in enumerate(names.items()):
            layers = [model.get_submodule(path) for path in paths.split()]
            rank, rows = 4 + number % 2, [len(layer.weight) for layer in layers]
            alpha = 1.5 + number % 3 if self.ends[2] else rank
            down = torch.randn(rank, *layers[0].weight.shape[1:], generator=generator) * 0.3
            up = torch.randn(sum(rows), rank, *(1,) * (down.ndim - 2), generator=generator) * 0.3
            key = self.prefix + (name.replace(".", "_") if self.prefix.endswith("_") else name)
            state |= {f"{key}.{self.ends[0]}": down, f"{key}.{self.ends[1]}": up}
            state |= {f"{key}.{self.ends[2]}": torch.tensor(float(alpha))} if self.ends[2] else {}
            whole = alpha / rank * up.flatten(1).double() @ down.flatten(1).double()
            parts = zip(paths.split(), layers, whole.split(rows), strict=True)
            changes |= {path: part.reshape(layer.weight.shape) for path, layer, part in parts}
        return state, changes

    def __str__(self) -> str:
        return f"{self.family} {self.tool}"


def _has(block: Any, path: str) -> bool:
    try:
        return block.get_submodule(path) is not None
    except AttributeError:
        return False


def alike(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def lists(modules: Modules, *names: str) -> dict[tuple[str, str], Modules]:
    return {(name, name): modules for name in names}


QKV, ADDED = "attn.to_q attn.to_k attn.to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
FEED_FORWARD = alike("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
Z_SPLIT = alike(*(f"attention.to_{x}" for x in ("q", "k", "v", "out.0"))) | FEED_FORWARD
Z_FUSED = {
    "attention.qkv": "attention.to_q attention.to_k attention.to_v", "attention.out": "attention.to_out.0", **FEED_FORWARD,
    "adaLN_modulation.0": "adaLN_modulation.0",
}  # fmt: skip
Z_OUTSIDE = {"x_embedder": "all_x_embedder.2-1", "final_layer.linear": "all_final_layer.2-1.linear"}
REFINERS = ("noise_refiner", "context_refiner", "layers")
LUMINA_BLOCK = {
    "attention.qkv": QKV, "attention.out": "attn.to_out.0", "feed_forward.w1": "feed_forward.linear_1",
    "feed_forward.w2": "feed_forward.linear_2", "feed_forward.w3": "feed_forward.linear_3", "adaLN_modulation.1": "norm1.linear",
}  # fmt: skip
STREAMS = {
    "img_attn.qkv": QKV, "img_attn.proj": "attn.to_out.0", "txt_attn.qkv": ADDED, "txt_attn.proj": "attn.to_add_out",
}  # fmt: skip
FLUX2 = {
    ("double_blocks", "transformer_blocks"): {
        **STREAMS, "img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out", "txt_mlp.0": "ff_context.linear_in",
        "txt_mlp.2": "ff_context.linear_out",
    },
    ("single_blocks", "single_transformer_blocks"): {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
}  # fmt: skip
FLUX2_OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "final_layer.linear": "proj_out", "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}  # fmt: skip
FLUX2_OWN = {
    ("transformer_blocks", "transformer_blocks"): alike("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    ("single_transformer_blocks", "single_transformer_blocks"): alike("attn.to_qkv_mlp_proj", "attn.to_out"),
}
CHROMA = {
    ("double_blocks", "transformer_blocks"): {
        **STREAMS, "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
    },
    ("single_blocks", "single_transformer_blocks"): {"linear1": f"{QKV} proj_mlp", "linear2": "proj_out"},
}  # fmt: skip
CHROMA_OUTSIDE = {
    "img_in": "x_embedder", "distilled_guidance_layer.in_proj": "distilled_guidance_layer.in_proj",
    "distilled_guidance_layer.layers.0.out_layer": "distilled_guidance_layer.layers.0.linear_2",
}  # fmt: skip
STREAM_LAYERS = [f"{stream}_{name}" for stream in ("img", "txt") for name in ("mlp.net.0.proj", "mlp.net.2")]
QWEN = lists(alike(*QKV.split(), *ADDED.split(), "attn.to_out.0", "attn.to_add_out", *STREAM_LAYERS), "transformer_blocks")
WAN = lists(
    {f"{name}.{x}": f"{own}.{y}" for name, own in (("self_attn", "attn1"), ("cross_attn", "attn2"))
     for x, y in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))}
    | {"cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj"}
    | {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"},
    "blocks",
)  # fmt: skip
HUNYUAN = {
    ("double_blocks", "transformer_blocks"): {
        "img_attn_qkv": QKV, "img_attn_proj": "attn.to_out.0", "txt_attn_qkv": ADDED, "txt_attn_proj": "attn.to_add_out",
        "img_mlp.fc1": "ff.net.0.proj", "img_mlp.fc2": "ff.net.2", "img_mod.linear": "norm1.linear",
    },
    ("single_blocks", "single_transformer_blocks"): {"linear2": "proj_out", "modulation.linear": "norm.linear"},
}  # fmt: skip
HUNYUAN_OUTSIDE = {
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj": "context_embedder.token_refiner.refiner_blocks.0.attn.to_out.0",
    "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
    "time_in.mlp.2": "time_text_embed.timestep_embedder.linear_2",
}  # fmt: skip
JOINT = {
    "x_block.attn.qkv": QKV, "x_block.attn.proj": "attn.to_out.0", "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2", "x_block.attn2.qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "x_block.attn2.proj": "attn2.to_out.0", "x_block.adaLN_modulation.1": "norm1.linear", "context_block.attn.qkv": ADDED,
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
}  # fmt: skip
SD35 = {("joint_blocks", "transformer_blocks"): JOINT}
SD35_OUTSIDE = {
    "context_embedder": "context_embedder", "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2", "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out",
}  # fmt: skip
SD35_OWN = lists(alike(*" ".join(JOINT.values()).split()), "transformer_blocks")
SD35_ATTENTION = lists(alike(*QKV.split(), *ADDED.split(), "attn.to_out.0", "attn.to_add_out"), "transformer_blocks")
SANA = lists(alike("attn1.to_q", "attn1.to_k", "attn1.to_v"), "transformer_blocks")
SANA_OWN = lists(
    alike(*(f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")), "ff.conv_inverted", "ff.conv_point"),
    "transformer_blocks",
)
SANA_ORIGINAL = {
    ("blocks", "transformer_blocks"): {
        "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v", "attn.proj": "attn1.to_out.0", "cross_attn.q_linear": "attn2.to_q",
        "cross_attn.kv_linear": "attn2.to_k attn2.to_v", "cross_attn.proj": "attn2.to_out.0",
        "mlp.inverted_conv.conv": "ff.conv_inverted", "mlp.point_conv.conv": "ff.conv_point",
    }
}  # fmt: skip
KREA_LAYERS = {
    "attn.wq": "attn.to_q", "attn.wk": "attn.to_k", "attn.wv": "attn.to_v", "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0", "mlp.gate": "ff.gate", "mlp.up": "ff.up", "mlp.down": "ff.down",
}  # fmt: skip
KREA = {("blocks", "transformer_blocks"): KREA_LAYERS} | {
    (f"txtfusion.{name}_blocks", f"text_fusion.{name}_blocks"): KREA_LAYERS for name in ("layerwise", "refiner")
}
KREA_OUTSIDE = {
    "first": "img_in", "last.linear": "final_layer.linear", "tmlp.0": "time_embed.linear_1", "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj", "txtmlp.1": "txt_in.linear_1", "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
}  # fmt: skip
KREA_OWN = {(own, own): alike(*KREA_LAYERS.values()) for _, own in KREA}
COMFY, UNET, TRANSFORMER = "diffusion_model.", "lora_unet_", "transformer."
Z, F2, Q = "ZImageLoraLoaderMixin", "Flux2LoraLoaderMixin", "QwenImageLoraLoaderMixin"
K2, S3, SA = "Krea2LoraLoaderMixin", "SD3LoraLoaderMixin", "SanaLoraLoaderMixin"
PEERS = (
    Peer("z_image", "musubi-tuner", UNET, KOHYA, lists(Z_SPLIT, "layers"), "kohya", Z),
    Peer("z_image", "musubi-tuner for ComfyUI", UNET, KOHYA, lists(Z_FUSED, "layers"), "kohya", Z, is_written=True),
    Peer("z_image", "ai-toolkit", COMFY, PEFT, lists(Z_SPLIT, *REFINERS), "comfyui", Z),
    Peer("z_image", "ComfyUI", COMFY, KOHYA, lists(Z_FUSED, *REFINERS), "comfyui", "", Z_OUTSIDE, True),
    Peer("z_image", "diffusers", TRANSFORMER, PEFT, lists(Z_SPLIT, *REFINERS), "diffusers", Z, is_written=True),
    Peer("z_image", "OneTrainer", TRANSFORMER, KOHYA, lists(Z_SPLIT, "layers"), "onetrainer"),
    Peer("flux2", "musubi-tuner", UNET, KOHYA, FLUX2, "kohya", F2, is_written=True),
    Peer("flux2", "ai-toolkit", COMFY, PEFT, FLUX2, "comfyui", F2, FLUX2_OUTSIDE),
    Peer("flux2", "ComfyUI", COMFY, KOHYA, FLUX2, "comfyui", "", FLUX2_OUTSIDE, True),
    Peer("flux2", "diffusers behind ComfyUI's prefix", COMFY, PEFT, FLUX2_OWN, "comfyui", F2),
    Peer("flux2", "diffusers", TRANSFORMER, PEFT, FLUX2_OWN, "diffusers", F2, is_written=True),
    Peer("flux2", "Black Forest Labs", "", PEFT, FLUX2, "bfl", round_trip="comfyui"),
    Peer("flux2", "peft", "base_model.model.", PEFT, FLUX2, "bfl", F2, round_trip="comfyui"),
    Peer("flux2", "OneTrainer", TRANSFORMER, KOHYA, FLUX2_OWN, "onetrainer"),
    Peer("chroma", "sd-scripts", UNET, KOHYA, CHROMA, "kohya", "FluxLoraLoaderMixin", is_written=True),
    Peer("chroma", "OneTrainer in the original format", "", PEFT_ALPHA, CHROMA, "bfl", round_trip="comfyui"),
    Peer("chroma", "diffusion-pipe", COMFY, PEFT, CHROMA, "comfyui", "", CHROMA_OUTSIDE),
    Peer("chroma", "diffusers", TRANSFORMER, PEFT, lists(alike(*QKV.split(), "proj_mlp"), "single_transformer_blocks"),
         "diffusers", "FluxLoraLoaderMixin", is_written=True),
    Peer("qwen_image", "musubi-tuner", UNET, KOHYA, QWEN, "kohya", Q, {"img_in": "img_in"}, True),
    Peer("qwen_image", "ai-toolkit", COMFY, PEFT, QWEN, "comfyui", Q),
    Peer("qwen_image", "ComfyUI", COMFY, KOHYA, QWEN, "comfyui", Q, {"proj_out": "proj_out"}, True),
    Peer("qwen_image", "diffusers", TRANSFORMER, PEFT, QWEN, "diffusers", Q, is_written=True),
    Peer("qwen_image", "DiffSynth-Studio", "", PEFT, QWEN, "diffusers"),
    Peer("lumina2", "sd-scripts", UNET, KOHYA, lists(LUMINA_BLOCK, *REFINERS), "kohya", is_written=True),
    Peer("lumina2", "diffusion-pipe", COMFY, PEFT, lists(LUMINA_BLOCK, *REFINERS), "comfyui", "Lumina2LoraLoaderMixin"),
    Peer("lumina2", "diffusers", TRANSFORMER, PEFT, lists(alike(*QKV.split()), "layers"), "diffusers", "Lumina2LoraLoaderMixin",
         is_written=True),
    Peer("wan_image", "musubi-tuner", UNET, KOHYA, WAN, "kohya", "WanLoraLoaderMixin", is_written=True),
    Peer("wan_image", "ComfyUI", COMFY, KOHYA, WAN, "comfyui", "", {"head.head": "proj_out"}, True),
    Peer("hunyuan_video", "musubi-tuner", UNET, KOHYA, HUNYUAN, "kohya"),
    Peer("hunyuan_video", "diffusion-pipe", TRANSFORMER, PEFT, HUNYUAN, "comfyui"),
    Peer("hunyuan_video", "HunyuanVideo", COMFY, PEFT, HUNYUAN, "comfyui", "HunyuanVideoLoraLoaderMixin", HUNYUAN_OUTSIDE),
    Peer("sana", "diffusers", TRANSFORMER, PEFT, SANA, "diffusers", SA, is_written=True),
    Peer("sana", "OneTrainer", TRANSFORMER, PEFT, SANA_OWN, "diffusers", SA, is_written=True),
    Peer("sana", "OneTrainer's backups", TRANSFORMER, KOHYA, SANA_OWN, "onetrainer"),
    Peer("sana", "OneTrainer in kohya's format", UNET, KOHYA, SANA_OWN, "kohya", round_trip="comfyui"),
    Peer("sana", "OneTrainer in ComfyUI's format", COMFY, PEFT_ALPHA, SANA_OWN, "comfyui"),
    Peer("sana", "ComfyUI_ExtraModels", COMFY, KOHYA, SANA_ORIGINAL, "comfyui", is_written=True),
    *(
        peer
        for family in ("sd35_medium", "sd35_large")
        for peer in (
            Peer(family, "sd-scripts", UNET, KOHYA, SD35, "kohya", "", SD35_OUTSIDE, True),
            Peer(family, "ComfyUI", COMFY, KOHYA, SD35, "comfyui", "", SD35_OUTSIDE, True),
            Peer(family, "ai-toolkit", TRANSFORMER, PEFT, SD35_OWN, "diffusers", S3, is_written=True),
            Peer(family, "SimpleTuner", TRANSFORMER, PEFT, SD35_ATTENTION, "diffusers", S3, is_written=True),
            Peer(family, "OneTrainer", "lora_transformer_", KOHYA, SD35_OWN, "onetrainer", is_written=True),
            Peer(family, "OneTrainer in ComfyUI's format", COMFY, PEFT_ALPHA, SD35, "comfyui"),
            Peer(family, "OneTrainer in the original format", "", PEFT_ALPHA, SD35, "bfl", round_trip="comfyui"),
        )
    ),
    Peer("krea2", "musubi-tuner", UNET, KOHYA, KREA, "kohya", "", KREA_OUTSIDE, True),
    Peer("krea2", "ai-toolkit", COMFY, PEFT, KREA, "comfyui", K2, KREA_OUTSIDE),
    Peer("krea2", "ComfyUI", COMFY, KOHYA, KREA, "comfyui", "", KREA_OUTSIDE, True),
    Peer("krea2", "peft", "base_model.model.", PEFT, KREA, "bfl", K2, round_trip="comfyui"),
    Peer("krea2", "diffusers", TRANSFORMER, PEFT, KREA_OWN, "diffusers", K2, is_written=True),
    Peer("krea2", "OneTrainer in ComfyUI's format", COMFY, PEFT_ALPHA, KREA, "comfyui", "", KREA_OUTSIDE),
    Peer("krea2", "OneTrainer in the original format", "", PEFT_ALPHA, KREA, "bfl", "", KREA_OUTSIDE, round_trip="comfyui"),
)  # fmt: skip


def tiny(family: str) -> Any:
    """The tiny transformer of a family, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family in MODELS:
            kind, config = MODELS[family]
            return kind(**config).eval()
        return DiffusersDiT().tiny()[family]()


@torch.no_grad()
def output(model: Any) -> Tensor:
    """The output of a transformer for fixed inputs."""
    images = model(**DiffusersDiT().sample(model), return_dict=False)[0]
    return torch.stack(images) if isinstance(images, list) else images


def load_in_diffusers(model: Any, family: str, mixin: str, path: Any) -> None:
    """Loads a file into a transformer by diffusers' loader."""
    loader: Any = getattr(diffusers.loaders.lora_pipeline, mixin)
    state, metadata = loader.lora_state_dict(_widen(path, family), return_lora_metadata=True)
    model.load_lora_adapter(_narrow(state, family), prefix="transformer", metadata=metadata)


def _widen(path: Any, family: str) -> Any:
    """The file, with the rows repeated of each layer that diffusers' converter splits at the published widths."""
    state = load_file(path)
    if family not in SCALE or any(key.startswith(TRANSFORMER) for key in state):
        return path
    is_split = re.compile(r"single_blocks.*linear1\.lora_up" if family == "chroma" else r"qkv\.lora_B")
    return {key: t.repeat_interleave(SCALE[family], 0) if is_split.search(key) else t for key, t in state.items()}


def _narrow(state: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """The converted tensors without the repeated rows; no layer of a tiny model has as many."""
    return {key: t[:: SCALE[family]] if "lora_B" in key and len(t) > 700 else t for key, t in state.items()}
