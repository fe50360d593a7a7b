"""IP-Adapter: cross-attention to image tokens, in addition to the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from veneer.injection.attachment.deferred_init import is_init_deferred
from veneer.injection.attention_sites import AttentionSite
from veneer.injection.errors import ConditionError, OptionError
from veneer.injection.method import Adapter, Method, Need, ParsedConditions
from veneer.injection.quantized_weight import float_tensor
from veneer.injection.sites import Site

from ._image_prompt import ImageTokens, Resampler, image_embeddings, read_masks, resize_masks

TOKENS = {"base": 4, "plus": 16}


@dataclass(frozen=True)
class IPAdapter(Method):
    """y = Attn(q, K, V) + s·Attn(q, c W_k', c W_v') with the image tokens c; q and the output projection are the host's.

    Tokens: `base` computes them from the image embedding e as LayerNorm(W e), `plus` from all patches by a resampler with learned
    queries. W_k', W_v' are initialized from the host's text projections. Used with `condition(image=…)` or `condition(embeds=…)`.

    Args:
        kind: kind of image features, `base` or `plus`. `width`: width of the image embeddings (ViT-H 1024) or patch embeddings
            (1280).
        tokens: image tokens per image; 0 for the default: 4 (`base`) or 16 (`plus`).
        depth: blocks of the resampler.
        dim: width of the resampler, whose heads have 64 channels; 0 for the text's width, at most 1280.
        zero_start: initializes W_v' to zero, so that a new adapter is the identity. False: from the host, as in the paper.
    Conditions are images, embedded by the pipeline's `image_encoder`, or `embeds` of (images, width), for `plus` (images,
    patches, width); one for all samples or one per prompt; several per prompt as nested lists, or (images, several, …).
    `negative` are the embeddings of the unconditional half, zeros by default. `mask`: where each of the several images applies.
    `layers`: maps stages or name patterns of blocks to strengths, such as `{"*": 0.0, "up.0": 1.0}`; the last match applies.
    Counts: SD 1.5 22,319,616, with embeddings of 1024; plus 49,087,488, with patches of 1280.
    Source: Ye et al., arXiv 2308.06721, equations 4 and 5. Deviation: `zero_start`.
    """

    name: ClassVar[str] = "ip_adapter"
    uses: ClassVar[tuple[str, ...]] = ("control", "style")
    recommended_for: ClassVar[tuple[str, ...]] = ("style", "control")
    paper: ClassVar[str] = "Ye et al., IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models, 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(AttentionSite, where={"cross": True, "plain": True}),)
    default: ClassVar[tuple[str, ...]] = ("xattn.processor",)
    conditions: ClassVar[tuple[str, ...]] = ("image", "embeds", "negative", "mask", "layers")
    learning_rate: ClassVar[float] = 1e-4
    shared_options: ClassVar[tuple[str, ...]] = ("kind", "width", "tokens", "depth", "dim")

    kind: Literal["base", "plus"] = "base"
    width: int = 1024
    tokens: int = 0
    depth: int = 4
    dim: int = 0
    zero_start: bool = True

    def __post_init__(self) -> None:
        if self.kind not in TOKENS:
            raise OptionError.of("ip_adapter", "kind", self.kind, "base or plus")
        if min(self.width, self.depth) < 1 or min(self.tokens, self.dim) < 0:
            message = f"ip_adapter: width and depth at least 1, tokens and dim at least 0, got {self}"
            least = {"width": 1, "depth": 1, "tokens": 0, "dim": 0}
            option = next(name for name, value in least.items() if getattr(self, name) < value)
            raise OptionError(message, option=option, method=self.name, given=getattr(self, option), expected=least[option])

    def build_shared(self, sites: Sequence[AttentionSite]) -> nn.Module:
        """The image projection."""
        widths = {site.context_width for site in sites}
        if len(widths) > 1:
            message = f"ip_adapter: the layers' contexts have widths {sorted(widths)}; select layers of one width with where=…"
            raise OptionError(message, option="where", method=self.name, given=tuple(sorted(widths)))
        (context,) = widths
        tokens = self.tokens or TOKENS[self.kind]
        if self.kind == "base":
            return ImageTokens(self.width, context, tokens)
        return Resampler(self.width, context, tokens, self.dim or min(context, 1280), self.depth)

    def build(self, site: AttentionSite) -> IPAdapterLayer:
        """W_k' and W_v' of one layer."""
        return IPAdapterLayer(site, self.zero_start)

    def count(self, site: AttentionSite) -> int:
        """2·D·context per layer."""
        return 2 * site.width * site.context_width

    def parse_conditions(self, sites: Sequence[Site], pipeline: Any, **conditions: Any) -> ParsedConditions:
        """Embeddings (images, several, …), those of the unconditional half, and masks (images, several, height, width)."""
        embeds, negative = image_embeddings(conditions, pipeline, self.kind == "plus")
        for name, value in (("embeds", embeds), ("negative", negative)):
            if value.shape[-1] != self.width:
                raise ConditionError(
                    f"ip_adapter: {name} have width {value.shape[-1]}; expected {self.width}, that of its image encoder.",
                    where=name,
                    given=value.shape[-1],
                    expected=self.width,
                )
        values = {"embeds": embeds, "negative": negative.expand_as(embeds)}
        if conditions.get("mask") is not None:
            values["mask"] = read_masks(conditions["mask"], *embeds.shape[:2])
        return values, {"layers": _layers(conditions.get("layers") or {}, sites)}

    def prepare_call(self, adapters: Sequence[tuple[Site, Adapter]]) -> None:
        """Computes the image tokens of this call, once for all layers."""
        shared: Any = adapters[0][1].get_submodule("shared")
        conditions = adapters[0][1].conditions

        def tokens() -> Tensor:
            embeds = conditions.values["embeds"]
            if conditions.conditioned is not None:
                rows = conditions.conditioned.view(-1, *[1] * (embeds.dim() - 1))
                embeds = torch.where(rows, embeds, conditions.values["negative"])
            made: Tensor = shared(embeds.to(next(shared.parameters()).dtype))
            return made

        made = conditions.cached(shared, tokens)
        for _, adapter in adapters:
            adapter.call.prepared = made

    def example(self, adapters: Sequence[tuple[Site, Adapter]], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """A noise embedding."""
        like = next(p for _, a in adapters for p in a.parameters())
        shape = (1, 1, 3, self.width) if self.kind == "plus" else (1, 1, self.width)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(like.device)
        return {"embeds": noise, "negative": torch.zeros_like(noise)}


class IPAdapterLayer(Adapter):
    """W_k' and W_v' of one layer, and the attention to the image tokens (batch, several, tokens, context)."""

    applies_strength: ClassVar[bool] = True

    def __init__(self, site: AttentionSite, zero_start: bool) -> None:
        super().__init__()
        self.site, self.zero_start = site, zero_start
        self.to_k_ip = nn.Linear(site.context_width, site.width, bias=False)
        self.to_v_ip = nn.Linear(site.context_width, site.width, bias=False)

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Copies the layer's text projections."""
        if is_init_deferred():
            return
        for own, name in ((self.to_k_ip, "to_k"), (self.to_v_ip, "to_v")):
            own.weight.copy_(float_tensor(tower, f"{self.site.path}.{name}", "weight"))
        if self.zero_start:
            self.to_v_ip.weight.zero_()

    def attend(self, inner: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's attention plus that to the image: `to_out` is linear, so that it may be applied to both separately."""
        y: Tensor = inner(attn, hidden_states, *args, **kwargs)
        strength = self.conditions.strength * self.conditions.options.get("layers", {}).get(self.site.name, 1.0)
        if strength == 0:
            return y
        attended = self.see(attn, hidden_states)
        out = attn.to_out[0]
        change = out(attended) - out(attended.new_zeros(1, 1, attended.shape[-1]))
        return y + (self.strength * strength).to(y.dtype) * (change / attn.rescale_output_factor).to(y.dtype)

    def see(self, attn: Any, hidden_states: Tensor) -> Tensor:
        """Attn(q, c W_k', c W_v'), (batch, length, width); with masks, image by image."""
        q = attn.to_q(hidden_states)
        q = self._heads(q if attn.norm_q is None else attn.norm_q(q))
        tokens = self.call.prepared.to(self.to_k_ip.weight.dtype)
        k, v = (project(tokens).to(q.dtype) for project in (self.to_k_ip, self.to_v_ip))
        mask = self.conditions.values.get("mask")
        if mask is None:
            return self._attention(q, k.flatten(1, 2), v.flatten(1, 2))
        fit = resize_masks(mask, hidden_states.shape[1]).to(q.dtype)
        parts = [self._attention(q, k[:, i], v[:, i]) * fit[:, i, :, None] for i in range(k.shape[1])]
        return torch.stack(parts).sum(0)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, self._heads(k), self._heads(v)).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)


def _layers(strengths: Mapping[str, float], sites: Sequence[Site]) -> dict[str, float]:
    """Strength of each layer by name.

    Raises:
        ConditionError: a pattern matches no layer.
    """
    found: dict[str, float] = {}
    for pattern, strength in strengths.items():
        meant = [s.name for s in sites if fnmatchcase(s.stage or "", pattern) or fnmatchcase(s.name, pattern)]
        if not meant:
            stages = ", ".join(dict.fromkeys(s.stage or s.name for s in sites))
            raise ConditionError(
                f"ip_adapter: layers has {pattern!r}, which matches no block; expected one of {stages}, or names of layers.",
                where="layers",
                given=pattern,
                expected=tuple(dict.fromkeys(s.stage or s.name for s in sites)),
            )
        found |= dict.fromkeys(meant, float(strength))
    return found
