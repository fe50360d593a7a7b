"""Which family of base models a file is for, told by the names in it and by widths that only one family has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ._reading import File

Shapes = Mapping[str, tuple[int, ...]]
SD1, SD2, SDXL, SD3 = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL", "Stable Diffusion 3"
# families that no host here knows, by names that nothing else has: musubi-tuner and others use the same layouts for them
FOREIGN = {
    r"blocks[._]\d+[._](?:self|cross)_attn[._][qkvo]\.": "Wan",
    r"(?:img|txt)_mlp[._]fc[12]|(?:img|txt)_mod[._]linear": "HunyuanVideo",
    r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mod|mlp)": "Qwen-Image",
    r"double_stream_modulation|to_qkv_mlp_proj": "FLUX.2",
    r"(?:double|single)_stream_blocks": "HiDream",
    r"layers[._]\d+[._]attention[._]": "Lumina or Z-Image",
}
NAMES = {
    r"double_blocks|single_blocks|single_transformer_blocks": "FLUX",
    r"joint_blocks": SD3,
    r"adaln_single|caption_projection|cross_attn[._](?:q|kv)_linear|y_embedder[._]y_proj": "PixArt",
}
JOINT = re.compile(r"transformer_blocks[._]\d+[._](?:attn[._]|ff_context|norm1_context)")
UNET = re.compile(r"(?:^|[._])(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]|^unet:")
DEEP = re.compile(r"(?:attentions|blocks|block)[._]\d+[._](?:\d+[._])?transformer_blocks[._][2-9][._]")
SECOND = re.compile(r"(?:^|[._])(?:te2|text_encoder_2|clip_g|label_emb|add_embedding)(?:[._]|$)")
DOWN = ("lora_down.weight", "lora_A.weight", "down.weight", ":down", "hada_w1_b", ":down1")
MODEL_WIDTHS = {3072: "FLUX", 1536: SD3, 2432: SD3}  # of blocks with two streams
TEXT_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL}  # of the text that a UNet reads
GUIDES = ("controlnet", "controlnext", "ip_adapter", "t2i_adapter")  # formats of whole networks beside a UNet
READ = re.compile(r"attn2\.to_k\.weight$|\.to_k_ip\.weight$")
UNSHUFFLED = re.compile(r"(?:adapter\.)?(?:conv_in|body\.0\.in_conv)\.weight")
WORD_WIDTHS = {768: SD1, 1024: SD2, 4096: None}


def family_of(shapes: Shapes, form: str | None = None) -> str | None:
    """The family, or None where nothing tells.

    Args:
        form: name of the file's format, if it is known.
    """
    if form == "embeddings":
        return _of_words(shapes)
    if form in GUIDES:
        return _of_guide(shapes)
    foreign = family_unknown(shapes)
    named = next((name for mark, name in NAMES.items() if _any(mark, shapes)), None)
    if foreign or named:
        return foreign or named
    if any(UNET.search(key) for key in shapes):
        return _of_unet(shapes)
    if any(JOINT.search(key) for key in shapes):
        widths = {shape[1] for key, shape in shapes.items() if JOINT.search(key) and key.endswith(DOWN) and len(shape) > 1}
        told = {MODEL_WIDTHS[width] for width in widths & MODEL_WIDTHS.keys()}
        return told.pop() if len(told) == 1 else None
    if _any(r"transformer_blocks[._]\d+[._]attn2[._]", shapes):
        return "PixArt"
    if _any(r"transformer_blocks[._]\d+[._]norm1[._]|proj_out_[12]", shapes):
        return "DiT"
    return "DiT or PixArt" if _any(r"transformer_blocks[._]\d+[._]attn1[._]", shapes) else None


def family_unknown(shapes: Shapes) -> str | None:
    """The family, if it is one that nothing here knows."""
    return next((name for mark, name in FOREIGN.items() if _any(mark, shapes)), None)


def told(file: File) -> str:
    """A sentence that says which family a file is for, if that is told."""
    family = family_of(file.shapes)
    if family is None:
        return ""
    return f" It is for {family}" + (", a family that is not known here." if family_unknown(file.shapes) else ".")


def _of_unet(shapes: Shapes) -> str | None:
    widths = {s[1] for k, s in shapes.items() if (UNET.search(k) or "unet" in k) and k.endswith(DOWN) and len(s) > 1}
    told = [TEXT_WIDTHS[width] for width in TEXT_WIDTHS if width in widths]
    if len(told) == 1:
        return told[0]
    if any(DEEP.search(key) or SECOND.search(key) for key in shapes):
        return SDXL
    projected = {len(s) for k, s in shapes.items() if re.search(r"proj_in[._]", k) and k.endswith(DOWN)}
    return SD1 if projected == {4} else None


def _of_guide(shapes: Shapes) -> str | None:
    """By the text that is read; of a network that reads none by the pixels, 8×8 or 16×16, that are one of its inputs."""
    widths = {s[1] for k, s in shapes.items() if READ.search(k) and len(s) == 2}
    told = [TEXT_WIDTHS[width] for width in TEXT_WIDTHS if width in widths]
    if told:
        return told[0] if len(told) == 1 else None
    if any(SECOND.search(key) for key in shapes):
        return SDXL
    first = next((s[1] for k, s in shapes.items() if UNSHUFFLED.fullmatch(k) and len(s) == 4), 0)
    return {64: f"{SD1} or 2", 192: f"{SD1} or 2", 768: SDXL}.get(first)


def _of_words(shapes: Shapes) -> str | None:
    if "clip_g" in shapes:
        return f"{SDXL} or 3" if "clip_l" in shapes else None
    if shapes.keys() & {"t5", "t5xxl"}:
        return "FLUX" if "clip_l" in shapes else None
    widths = {shape[-1] for shape in shapes.values() if shape}
    return WORD_WIDTHS.get(widths.pop()) if len(widths) == 1 else None


def _any(mark: str, keys: Iterable[str]) -> bool:
    found = re.compile(mark)
    return any(found.search(key) for key in keys)
