"""Small models for the files, each built once per process, and their weights under the names of a format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from tests.formats.guides import KINDS, tiny
from tests.formats.malformed.meanings import Base
from veneer.formats._names.modules import original_modules
from veneer.injection.host import Host
from veneer.injection.registry import hosts
from veneer.injection.sites import ParamSite, Site, WeightSite
from veneer.injection.towers import towers_of


class Small(nn.Module):
    """An embedding, a convolution, a linear layer with a bias and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(2, 6, 3, bias=False)
        self.fc = nn.Linear(6, 8)
        self.out = nn.Linear(8, 4, bias=False)


class SmallHost(Host):
    """Sites of `Small`."""

    name: ClassVar[str] = "small"
    tower: ClassVar[str] = "toy"
    library: ClassVar[str] = "torch"

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Small)

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        yield WeightSite(name="table", role="embed.token", path="table", kind="embedding", d_out=4, d_in=5)
        geometry: Any = {"kernel": (3, 3), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
        yield WeightSite(name="conv", role="conv", path="conv", kind="conv", d_out=6, d_in=2, depth=0, **geometry)
        yield WeightSite(name="fc", role="mlp.in", path="fc", d_out=8, d_in=6, depth=0)
        yield ParamSite(name="fc.bias", role="bias.mlp.in", path="fc", param="bias", shape=(8,), called=True, depth=0)
        yield WeightSite(name="out", role="mlp.out", path="out", d_out=4, d_in=8, depth=1)

    def sample(self, model: nn.Module) -> dict[str, Any]:
        raise NotImplementedError

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {}


@contextlib.contextmanager
def small_host() -> Iterator[None]:
    """Context in which `Small` is a supported model."""
    hosts.register(SmallHost)
    try:
        yield
    finally:
        hosts.unregister("small")


def _small() -> Any:
    return Small().eval()


def _text() -> Any:
    """A text encoder with its tokenizer, of a pipeline without anything else."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from veneer.testing.tokenizers import clip_tokenizer

    tokenizer = clip_tokenizer()
    ids: Any = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    width: Any = {"hidden_size": 8, "intermediate_size": 12, "projection_dim": 8}
    config = CLIPTextConfig(vocab_size=len(tokenizer), num_hidden_layers=1, num_attention_heads=2, **width, **ids)
    return SimpleNamespace(components={"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer})


def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=6,
        pooled_projection_dim=6, guidance_embeds=False, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return model.eval()


@cache
def model(kind: str) -> Any:
    """One model of a kind for the whole process: every load leaves it as it was, and that is checked."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"small": _small, "text": _text, "flux": _flux}[kind]() if kind not in KINDS else tiny(kind)


def towers(kind: str) -> dict[str, nn.Module]:
    return {t.component: t.module for t in towers_of(model(kind))}


@cache
def base(kind: str, *spellings: Callable[[str, str], str]) -> Base:
    """Arrays of a model, and its layers by the names in `spellings(component, path)`."""
    weights, layers = {}, {}
    for component, tower in towers(kind).items():
        for name, p in tower.named_parameters():
            weights[f"{component}/{name}"] = p.detach().double().numpy()
        for path, layer in tower.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding)):
                layers.update({spelt(component, path): (f"{component}/{path}.weight",) for spelt in spellings})
    widths = {"text_encoder.embeddings.token_embedding.vocabulary": 8} if kind == "text" else {}
    return Base(weights, layers, widths=widths)


@cache
def flux(layout: str) -> Base:
    """FLUX's layers by their original names."""
    (tower,) = towers_of(model("flux"))
    found, swapped = {}, set()
    for m in original_modules(tower):
        names = {"bfl": m.path, "kohya": f"lora_unet_{m.path.replace('.', '_')}", "comfyui": f"diffusion_model.{m.path}"}
        name = names.get(layout)
        if layout == "xlabs":
            block, _, part = m.path.partition("_attn.")
            stream = {"img": "1", "txt": "2"}.get(block[-3:])
            name = f"{block[:-4]}.processor.{part}_lora{stream}" if stream else None
            if m.path.startswith("single_blocks.0.linear"):
                name = f"single_blocks.0.processor.{'qkv' if m.path.endswith('1') else 'proj'}_lora"
        if name:
            found[name] = tuple(f"/{s.path}.weight" for s in m.sites[: 3 if layout == "xlabs" else None])
            swapped |= {name} if m.swapped else set()
    return Base(base("flux").weights, found, frozenset(swapped))
