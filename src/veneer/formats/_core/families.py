"""Detects the family of base models that a file was made for, where layer names and widths identify it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from .._io.reader import File

Shapes = Mapping[str, tuple[int, ...]]
SD1, SD2, SDXL, SD3 = "Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL", "Stable Diffusion 3"
WAN, Z_IMAGE, LUMINA, KREA = "Wan", "Z-Image", "Lumina 2", "Krea 2"
# families without a host in veneer, by layer names that occur nowhere else: musubi-tuner and others use the same layouts
UNSUPPORTED = {
    r"(?:double|single)_stream_blocks": "HiDream",
    r"audio_attn[12]|audio_to_video_attn|video_to_audio_attn": "LTX-2",
}
NAMES = {
    r"blocks[._]\d+[._](?:self|cross)_attn[._](?:[qkvo]|[kv]_img)\.": WAN,
    r"(?<!transformer_)blocks[._]\d+[._](?:attn[12][._](?:to|add)_|ffn[._]net[._])": WAN,
    r"(?:img|txt)_mlp[._]fc[12]|(?:img|txt)_mod[._]linear|single_blocks[._]\d+[._]modulation[._]linear": "HunyuanVideo",
    r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mod|mlp)": "Qwen-Image",
    r"(?:double|single)_stream_modulation|to_qkv_mlp_proj|ff(?:_context)?[._]linear_(?:in|out)": "FLUX.2",
    r"joint_transformer_blocks|single_transformer_blocks[._]\d+[._](?:attn[._]to_out[._]0|ff[._])": "AuraFlow",
    r"double_blocks\.\d+\.(?:img|txt)_attn_": "HunyuanVideo",
    r"distilled_guidance_layer": "Chroma",
    r"(?:txt|text_)fusion|txtmlp[._]\d": KREA,
    r"blocks[._]\d+[._](?:attn[._](?:w[qkvo]|(?:to_)?gate)|(?:mlp|ff)[._](?:gate|up|down))[._]": KREA,
    r"ff[._]conv_inverted|mlp[._]inverted_conv": "Sana",
    r"joint_blocks": SD3,
    r"processor[._](?:qkv|proj)_lora": "FLUX",
    r"norm1[._]emb[._]timestep_embedder|proj_out_[12]": "DiT",
}
"""Families by layer names that occur nowhere else."""
FAMILY_ARCHITECTURES = {
    SD1: "sd15", SD2: "sd21", SDXL: "sdxl", "FLUX": "flux", "PixArt": "pixart", "DiT": "dit", "Chroma": "chroma",
    Z_IMAGE: "z-image", LUMINA: "lumina2", "Qwen-Image": "qwen-image", "HunyuanVideo": "hunyuan-video",
    KREA: "krea-2",
}  # fmt: skip
SIZES = {
    "FLUX.2": {6144: "flux2", 3072: "flux2-klein-4b", 4096: "flux2-klein-9b"},
    WAN: {1536: "wan-1.3b", 3072: "wan-5b", 5120: "wan-14b"},
    "Sana": {2240: "sana"},
}
"""Architectures of a family by the width of their blocks, largest first if another layer has the width of a smaller one."""
WIDTH = re.compile(
    r"(?:(?:self|cross)_attn|attn[12]?)[._]|linear1|(?:img|txt)_mlp[._]0|ff(?:_context)?[._]linear_in|ffn[._](?:0|net[._]0)"
)
IMAGE_KEYS = re.compile(r"cross_attn[._][kv]_img|attn2[._]add_[kv]_proj")  # of Wan from image to video
NEXT_DIT = re.compile(r"(?:layers|(?:noise|context)_refiner)[._]\d+[._](?:attention|attn|feed_forward)[._]")
NEXT_DIT_WIDTHS = {3840: Z_IMAGE, 2304: LUMINA}
LUMINA_KEYS = re.compile(r"(?:layers|_refiner)[._]\d+[._](?:attn[._]to_|feed_forward[._]linear_)")  # of diffusers
Z_IMAGE_KEYS = re.compile(r"(?:layers|_refiner)[._]\d+[._]attention[._]to_")
UNET = re.compile(r"(?:^|[._])(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)[._]|^unet:")
DEEP = re.compile(r"(?:attentions|blocks|block)[._]\d+[._](?:\d+[._])?transformer_blocks[._][2-9][._]")
SECOND = re.compile(r"(?:^|[._])(?:te2|text_encoder_2|clip_g|label_emb|add_embedding)(?:[._]|$)")
DOWN = ("lora_down.weight", "lora_A.weight", "down.weight", ":down", "hada_w1_b", ":down1")
TEXT_CHANNELS = {320, 640, 1280}  # widths of the published UNets' levels
TEXT_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL}  # width of the text embeddings that a UNet reads
CROSS = re.compile(r"transformer_blocks[._]\d+[._]attn2[._]|cross_attn[._](?:q|kv)_linear|cross_attn[._]proj")
CROSS_WIDTHS = {1152: "PixArt or Sana", 2048: "LTX", 2240: "Sana", 2304: "Allegro"}  # query width of attn2
DOUBLE = re.compile(r"(?:(?<!single_)(?<!joint_)transformer_blocks|double_blocks)[._](\d+)[._]")
SINGLE = re.compile(r"single_(?:transformer_)?blocks[._](\d+)[._]")
BLOCKS = re.compile(r"(?<!joint_)transformer_blocks[._]\d|(?:double|single)_blocks[._]\d")
TWO_STREAMS = re.compile(r"transformer_blocks[._]\d+[._](?:attn[._]|ff_context|norm1_context)|(?:double|single)_blocks[._]\d")
QUERIES = re.compile(
    r"attn[12]?[._](?:to_[qkv]|add_[qkv]_proj|qkv)|linear1|norm1?(?:_context)?[._]linear|mlp[._]0|net[._]0|proj_mlp|lin[._:]"
)
KEYS = re.compile(r"attn[._]to_[kv]")
KREA_KEY_ROWS = 1536  # Krea 2 has a quarter as many heads of keys as of queries, FLUX.2 as many
MODULATED = re.compile(r"norm1?(?:_context)?[._]linear|(?:img|txt)_mod[._]lin|modulation[._]lin")
# modulation of an image stream that has two attentions in SD3.5 medium, and there 13,824 rows
SD3_MODULATION = re.compile(r"(?:transformer|joint)_blocks[._](?:\d|1[0-2])[._](?:norm1[._]linear|x_block[._]adaLN_modulation)")
STREAM_WIDTHS = {1536: SD3, 2432: SD3, 2048: "HunyuanVideo 1.5", 3584: "HunyuanImage", 4096: "FLUX.2"}
# sizes of the first feed-forward layer, alone or behind queries, keys and values: those of FLUX.2 have a gate
FEED_FORWARD = re.compile(r"single_blocks[._]\d+[._]linear1|(?:img|txt)_mlp[._]0")
GATED, UNGATED = {18432, 27648}, {12288, 21504}
# transformers of width 3072: number of double- and single-stream blocks, and whether blocks have modulation layers
STREAMS = {
    "FLUX": (19, 38, True), "Chroma": (19, 38, False), "Bria": (19, 38, True), "LongCat": (19, 38, True),
    "HunyuanVideo": (20, 40, True), "Qwen-Image": (60, 0, False), "FLUX.2": (5, 20, False),
}  # fmt: skip
DIFFUSERS_ONLY = ("Bria", "LongCat", "Qwen-Image")  # have no Black Forest Labs layer names
CONTROL_FORMATS = ("controlnet", "controlnext", "ip_adapter", "t2i_adapter")  # formats of networks beside a UNet
READ = re.compile(r"attn2\.to_k\.weight$|\.to_k_ip\.weight$")
UNSHUFFLE = re.compile(r"(?:adapter\.)?(?:conv_in|body\.0\.in_conv)\.weight")
EMBEDDING_WIDTHS = {768: SD1, 1024: SD2, 4096: None}


def family_of(shapes: Shapes, form: str | None = None) -> str | None:
    """The family, alternatives joined by "or" if several match, or None.

    Args:
        form: name of the file's format, if known.
    """
    if form == "embeddings":
        return _embedding_family(shapes)
    if form in CONTROL_FORMATS:
        return _control_family(shapes)
    family = unsupported_family(shapes) or next((name for mark, name in NAMES.items() if _any_match(mark, shapes)), None)
    if family:
        return family
    if any(UNET.search(key) for key in shapes):
        return _unet_family(shapes)
    if any(NEXT_DIT.search(key) for key in shapes):
        return _next_dit_family(shapes)
    return _double_stream_family(shapes) or _single_stream_family(shapes)


def architecture_of(shapes: Shapes, form: str | None = None, model_spec: str = "") -> str | None:
    """Name of the architecture that a file's layers fit, one of `veneer.base_models.ARCHITECTURES`; None if several or none do.

    SD3.5 medium has every layer of SD3, with wider modulation layers. The layers that Chroma and HunyuanVideo share with FLUX.1
    have the same names and shapes: a file of no other layers is taken as one of FLUX.1.

    Args:
        form: name of the file's format, if known.
        model_spec: architecture in the file's metadata, which decides between several that fit.
    """
    families = re.split(", | or ", family_of(shapes, form) or "")
    if SD3 in families:
        if any(width == 2432 for _, width in _input_widths(shapes)):
            return "sd35-large"
        return "sd3" if any(9216 in shape and SD3_MODULATION.search(key) for key, shape in shapes.items()) else "sd35"
    known = [name for family in families if (name := FAMILY_ARCHITECTURES.get(family) or _size_of(family, shapes))]
    if (name := model_spec.partition("/")[0].lower()) in known:
        return name
    return known[0] if len(known) == 1 or "flux" in known[:1] else None


def unsupported_family(shapes: Shapes) -> str | None:
    """The family, if it has no host in veneer."""
    return next((name for mark, name in UNSUPPORTED.items() if _any_match(mark, shapes)), None)


def family_sentence(file: File) -> str:
    """A sentence that names the family a file is for; empty if it is unknown."""
    family = family_of(file.shapes)
    if family is None:
        return ""
    return f" It is for {family}" + (", which veneer does not support." if unsupported_family(file.shapes) else ".")


def _size_of(family: str, shapes: Shapes) -> str | None:
    """The architecture of a family in several sizes, by the width of its blocks."""
    widths = {width for key, width in _input_widths(shapes) if WIDTH.search(key)}
    name = next((name for width, name in SIZES.get(family, {}).items() if width in widths), None)
    return f"{name}-i2v" if name == "wan-14b" and any(IMAGE_KEYS.search(key) for key in shapes) else name


def _next_dit_family(shapes: Shapes) -> str | None:
    """Z-Image or Lumina-Image 2, which have the same names in ComfyUI: by diffusers' names, else by width."""
    if any(LUMINA_KEYS.search(key) for key in shapes):
        return LUMINA
    widths = {width for key, width in _input_widths(shapes) if NEXT_DIT.search(key)}
    families = [family for width, family in NEXT_DIT_WIDTHS.items() if width in widths]
    if len(families) == 1 or any(Z_IMAGE_KEYS.search(key) for key in shapes):
        return families[0] if len(families) == 1 else None
    return None if widths else f"{LUMINA} or {Z_IMAGE}"


def _unet_family(shapes: Shapes) -> str | None:
    widths = {key: width for key, width in _input_widths(shapes) if UNET.search(key) or "unet" in key}
    read = {width for key, width in widths.items() if re.search(r"attn2[._]to_[kv][._:]", key)}
    families = [family for width, family in TEXT_WIDTHS.items() if width in (read or {*widths.values()})]
    if read or len(families) == 1:
        return families[0] if len(families) == 1 else None
    if not TEXT_CHANNELS & {*widths.values()}:
        return None
    if any(DEEP.search(key) or SECOND.search(key) for key in shapes):
        return SDXL
    projected = {len(s) for k, s in shapes.items() if re.search(r"proj_in[._]", k) and k.endswith(DOWN)}
    return SD1 if projected == {4} else None


def _input_widths(shapes: Shapes) -> Iterator[tuple[str, int]]:
    """One key per low-rank layer, with the layer's input width."""
    for key, shape in shapes.items():
        if key.endswith(DOWN) and len(shape) > 1:
            yield key, shape[1]
        elif key.endswith(("lokr_w1", "lokr_w1_b")) and len(shape) == 2:
            start = key[: key.rindex("lokr_w1")]
            right = shapes.get(f"{start}lokr_w2") or shapes.get(f"{start}lokr_w2_b") or ()
            yield from [(key, shape[1] * right[1])] if len(right) > 1 else []


def _double_stream_family(shapes: Shapes) -> str | None:
    """Family of transformers with separate image and text streams, by width and number of blocks."""
    keys = [key for key in shapes if BLOCKS.search(key)]
    widths = {width for key, width in _input_widths(shapes) if BLOCKS.search(key) and QUERIES.search(key)}
    if len(widths) != 1 or not any(TWO_STREAMS.search(key) for key in keys):
        return None
    (width,) = widths
    if width == 6144:
        rows = {shape[0] for key, shape in shapes.items() if KEYS.search(key) and shape}
        if KREA_KEY_ROWS in rows:
            return KREA
        is_flux = width in rows or _any_match(r"add_[qkv]_proj|context|double_blocks", shapes)
        return "FLUX.2" if is_flux else f"FLUX.2 or {KREA}"
    if width != 3072 or _any_match("token_refiner", shapes):
        return STREAM_WIDTHS.get(width, "HunyuanVideo" if width == 3072 else None)
    lasts = [max((int(m[1]) for key in keys if (m := block.search(key))), default=-1) for block in (DOUBLE, SINGLE)]
    names = _matching_families(shapes, lasts, any(MODULATED.search(key) for key in keys))
    complete = [name for name in names if all(last in (-1, n - 1) for last, n in zip(lasts, STREAMS[name][:2], strict=True))]
    return _join_alternatives(complete or names)


def _matching_families(shapes: Shapes, lasts: Sequence[int], modulated: bool) -> list[str]:
    """The families in `STREAMS` that have these block counts and layer names."""
    away = set[str]()
    sizes = {size for key, shape in shapes.items() if FEED_FORWARD.search(key) for size in shape}
    if sizes & GATED:
        return ["FLUX.2"]
    if sizes & UNGATED:
        away.add("FLUX.2")
    if _any_match("(?:double|single)_blocks", shapes):
        away.update(DIFFUSERS_ONLY)
    if _any_match("time_text_embed", shapes):
        away |= {"Bria", "LongCat"}
    return [
        name
        for name, (double, single, has_modulation) in STREAMS.items()
        if name not in away and lasts[0] < double and lasts[1] < single and (has_modulation or not modulated)
    ]


def _single_stream_family(shapes: Shapes) -> str | None:
    """Family of transformers with one stream, whose text enters by cross-attention if at all, by width."""
    widths = {key: width for key, width in _input_widths(shapes) if re.search(r"attn[12]?[._]|(?:q|kv)_linear", key)}
    across = {width for key, width in widths.items() if CROSS.search(key)}
    if across == {4096, 1024}:
        return "Cosmos"
    if {*widths.values()} == {1152} and _any_match(r"transformer_blocks[._]\d+[._]ff[._]net|mlp[._]fc1|adaln_single", shapes):
        return "PixArt" if across else "DiT or PixArt"
    if across:
        return CROSS_WIDTHS.get(across.pop()) if len({*widths.values()}) == 1 else None
    alone = _any_match(r"transformer_blocks[._]\d+[._]attn1[._]", shapes) and {*widths.values()} == {1152}
    return "DiT, PixArt or Sana" if alone else None


def _join_alternatives(names: Sequence[str]) -> str | None:
    return " or ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or None


def _control_family(shapes: Shapes) -> str | None:
    """Family by text width; without text attention, by the input channels after 8×8 or 16×16 pixel unshuffling."""
    widths = {s[1] for k, s in shapes.items() if READ.search(k) and len(s) == 2}
    families = [TEXT_WIDTHS[width] for width in TEXT_WIDTHS if width in widths]
    if widths:
        return families[0] if len(families) == 1 else None
    if any(SECOND.search(key) and 2816 in shape for key, shape in shapes.items()):
        return SDXL
    first = next((s[1] for k, s in shapes.items() if UNSHUFFLE.fullmatch(k) and len(s) == 4), 0)
    return {64: f"{SD1} or 2", 192: f"{SD1} or 2", 768: SDXL}.get(first)


def _embedding_family(shapes: Shapes) -> str | None:
    if "clip_g" in shapes:
        return f"{SDXL} or 3" if "clip_l" in shapes else None
    if shapes.keys() & {"t5", "t5xxl"}:
        return "FLUX" if "clip_l" in shapes else None
    widths = {shape[-1] for shape in shapes.values() if shape}
    return EMBEDDING_WIDTHS.get(widths.pop()) if len(widths) == 1 else None


def _any_match(mark: str, keys: Iterable[str]) -> bool:
    found = re.compile(mark)
    return any(found.search(key) for key in keys)
