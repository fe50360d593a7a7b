"""LoRA and token embeddings in one file, as cloneofsimo/lora writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.sites import VocabularySite, WeightSite
from veneer.injection.towers import Tower, towers_of

from ._core.attach import AttachmentSpec, attach_all
from ._core.format import Format, LayerInfo, Options, count_parameters
from ._core.lora_config import LoRALayer, component_of, config_of, match_shape
from ._io.reader import File

COMPONENTS: tuple[str, ...] = ("unet", "text_encoder")
KEY = re.compile(r"(unet|text_encoder):([0-9]{1,6}):(up|down)")
TOKEN = "<embed>"  # metadata value of a token
PATH = re.compile(
    r"(?P<stage>down_blocks|up_blocks|mid_block)(?:\.(?P<level>\d+))?\.(?P<list>attentions|resnets)\.(?P<i>\d+)\."
    r"(?:transformer_blocks\.(?P<j>\d+)\.)?(?P<leaf>.+)"
)
ATTENTION = tuple(f"{attn}.{x}" for attn in ("attn1", "attn2") for x in ("to_q", "to_k", "to_v", "to_out.0"))
GATE, RESNET = "ff.net.0.proj", ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
LAYERS = {"CrossAttention": ATTENTION, "Attention": ATTENTION, "GEGLU": (GATE,), "ResnetBlock2D": RESNET}
# order in which diffusers registers the parts of a block: until 0.16, and since
ORDERS = ((*ATTENTION[:4], GATE, *ATTENTION[4:], *RESNET), (*ATTENTION, GATE, *RESNET))
CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")


class CloneOfSimo(Format):
    """`unet:{i}:down` (r, d_in), `unet:{i}:up` (d_out, r), `text_encoder:{i}:…`, and a vector under each token; ΔW = B A.

    i numbers the layers in the registration order of the original model, within modules of the classes in the metadata: down,
    up, then middle blocks; attentions before resnets; in a block attn1, GEGLU, attn2 (diffusers until 0.16) or attn1,
    attn2, GEGLU, whichever matches the shapes; in CLIP k, v, q, out. There is no alpha: s = 1. Loaded as a lora attachment and a
    textual_inversion attachment. Read only.
    Source: cloneofsimo/lora `lora_diffusion/lora.py`, `save_safeloras_with_embeds` and `_find_modules_v2`.
    """

    name: ClassVar[str] = "cloneofsimo"
    file: ClassVar[str] = "lora.safetensors"

    def reads(self, file: File) -> bool:
        return any(KEY.fullmatch(key) for key in file.shapes)

    def layers(self, file: File) -> list[LayerInfo]:
        numbered = [f"{c}:{i}" for c in COMPONENTS for i in layer_indices(file, c)]
        ranks = {name: (file.shapes.get(f"{name}:down") or (0,))[0] for name in numbered}
        halves = {name: [key for half in ("up", "down") if (key := f"{name}:{half}") in file.shapes] for name in numbered}
        found = [LayerInfo(name, "lora", rank, float(rank), count_parameters(file, halves[name])) for name, rank in ranks.items()]
        tokens = [key for key in file.shapes if file.metadata.get(key) == TOKEN]
        return [*found, *(LayerInfo(t, "textual_inversion", values=math.prod(file.shapes[t])) for t in tokens)]

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        towers = {_component(t): t for t in towers_of(model)}
        tensors = file.tensors(finite=options.strict)
        places = {c: _order(file, c, towers[c]) for c in COMPONENTS if c in towers and layer_indices(file, c)}
        tokens = {key: t for key, t in tensors.items() if file.metadata.get(key) == TOKEN}
        words = [s for s in towers["text_encoder"].sites if isinstance(s, VocabularySite)] if "text_encoder" in towers else []
        read = {f"{c}:{i}:{half}" for c, sites in places.items() for i in range(len(sites)) for half in ("up", "down")}
        unused = [key for key in tensors if key not in read and not (key in tokens and words)]
        if unused and (options.strict or len(unused) == len(tensors)):
            raise LoadError(
                f"{file.path}: unused {len(unused)} of {len(tensors)} tensors: {', '.join(unused[:8])}. It was made for a "
                "complete Stable Diffusion pipeline. Load it on one, or pass strict=False.",
                file=file.path,
                unused=unused,
            )
        found = [_tokens(file, tokens, words[0], options)] if tokens and words else []
        found += [_lora(places, tensors, unused)] if places else []
        return attach_all(model, file, found, options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        raise SaveError(
            f"{target}: this format is read only: it numbers its layers, and the order depends on the version of diffusers. "
            "Use kohya, diffusers or native.",
            file=target,
            given=self.name,
            expected=("kohya", "diffusers", "native"),
        )


def layer_indices(file: File, component: str) -> list[int]:
    """Indices of a component's layers."""
    found = {int(m[2]) for key in file.shapes if (m := KEY.fullmatch(key)) and m[1] == component}
    return sorted(found)


def _component(tower: Tower) -> str:
    return tower.component or component_of(tower.module)


def _order(file: File, component: str, tower: Tower) -> list[WeightSite]:
    """The sites of a component's layers, by index.

    Raises:
        LoadError: unsupported module classes, or no order in which the shapes match.
    """
    sites = [s for s in tower.sites if isinstance(s, WeightSite) and not s.fused]
    numbers = layer_indices(file, component)
    if component == "text_encoder":
        candidates = [sorted((s for s in sites if s.role.startswith("attn.")), key=_in_clip)]
    else:
        candidates = [_in_unet(tower, sites, order, _layers_in_classes(file)) for order in ORDERS]
    fitting = next((c for c in candidates if numbers == list(range(len(c))) and _shapes_match(file, component, c)), None)
    if fitting is None:
        raise LoadError(
            f"{file.path}: its {len(numbers)} layers of '{component}' do not match the {len(candidates[0])} of this model in "
            "number or shape. It was made for another base model (Stable Diffusion 1 or 2).",
            file=file.path,
            where=component,
            given=len(numbers),
            expected=len(candidates[0]),
        )
    return fitting


def _layers_in_classes(file: File) -> set[str]:
    """Paths inside a block of the layers in the module classes named by the metadata.

    Raises:
        LoadError: an unsupported class.
    """
    classes = file.json("unet") if "unet" in file.metadata else list(LAYERS)[:3]
    if not isinstance(classes, list) or not set(map(str, classes)) <= LAYERS.keys():
        message = f"{file.path}: its layers are in modules of class {str(classes)[:80]}; supported: {', '.join(LAYERS)}."
        raise LoadError(message, file=file.path, where="unet", given=classes, expected=tuple(LAYERS))
    return {leaf for name in classes for leaf in LAYERS[name]}


def _in_unet(tower: Tower, sites: Sequence[WeightSite], order: Sequence[str], leaves: set[str]) -> list[WeightSite]:
    """Sites of these layers in the registration order of the UNet: level by level, the middle block last."""
    keys = {}
    for site in sites:
        match = PATH.fullmatch(site.name.removeprefix(tower.component + "."))
        if match is not None and match["leaf"] in leaves:
            stage = ("down_blocks", "up_blocks", "mid_block").index(match["stage"])
            numbers = [int(match[n] or 0) for n in ("level", "i", "j")]
            keys[site.name] = (stage, numbers[0], match["list"] == "resnets", *numbers[1:], order.index(match["leaf"]))
    return sorted((s for s in sites if s.name in keys), key=lambda s: keys[s.name])


def _in_clip(site: WeightSite) -> tuple[int, int]:
    return site.depth or 0, CLIP.index(site.name.rpartition(".")[2])


def _shapes_match(file: File, component: str, sites: Sequence[WeightSite]) -> bool:
    for i, site in enumerate(sites):
        down, up = (file.shapes.get(f"{component}:{i}:{half}", ()) for half in ("down", "up"))
        if min(len(down), len(up)) < 2 or not 0 < down[0] == up[1] or (down[1], up[0]) != (site.d_in, site.d_out):
            return False
        if down[2:] not in (site.kernel, (1,) * len(down[2:])):
            return False
    return True


def _lora(places: Mapping[str, Sequence[WeightSite]], tensors: Mapping[str, Tensor], unused: Sequence[str]) -> AttachmentSpec:
    found: dict[str, LoRALayer] = {}
    state: dict[str, Tensor] = {}
    for component, sites in places.items():
        for i, site in enumerate(sites):
            down, up = (tensors[f"{component}:{i}:{half}"] for half in ("down", "up"))
            rank = down.shape[0]
            found[site.name] = LoRALayer(site, rank, float(rank))
            state[f"{site.name}:down"] = match_shape(down, (rank, *site.weight_shape[1:]))
            state[f"{site.name}:up"] = match_shape(up, (site.d_out, rank, *(1,) * len(site.kernel)))
    return AttachmentSpec("lora", "lora", config_of(found), list(found), state, unused=unused)


def _tokens(file: File, tokens: Mapping[str, Tensor], site: VocabularySite, options: Options) -> AttachmentSpec:
    """Specification of the token embeddings, one or more vectors each."""
    vectors = {token: t[None] if t.ndim == 1 else t for token, t in sorted(tokens.items())}
    if len({tuple(v.shape) for v in vectors.values()}) > 1 or any(v.shape[1:] != (site.width,) for v in vectors.values()):
        shapes = ", ".join(f"{token} {tuple(t.shape)}" for token, t in tokens.items())
        message = f"{file.path}: its tokens are {shapes}; the text encoder has width {site.width}. Load it on its base model."
        by_token = {token: tuple(t.shape) for token, t in tokens.items()}
        raise LoadError(message, file=file.path, given=by_token, expected=site.width)
    names = list(vectors)
    if options.token is not None:
        if len(names) > 1:
            message = f"{file.path}: has {len(names)} tokens, {', '.join(names)}; token= can rename only one."
            raise LoadError(message, file=file.path, option="token", given=tuple(names), expected=1)
        names = [options.token]
    rows = torch.cat(list(vectors.values()))
    config = {"tokens": names if len(names) > 1 else names[0], "vectors": len(rows) // len(names)}
    return AttachmentSpec("textual_inversion", "textual_inversion", config, [site.name], {f"{site.name}:vectors": rows})


save = CloneOfSimo().save
