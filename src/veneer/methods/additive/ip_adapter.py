"""IP-Adapter: cross-attention to tokens of a picture, beside that to the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from veneer.injection.attachment.deferred_init import values_follow
from veneer.injection.errors import ConditionError, OptionError
from veneer.injection.method import Adapter, Method, Need, ParsedConditions
from veneer.injection.seams.adapter_calls import base_tensor
from veneer.injection.sites import AttentionSite, Site

from ._image_prompt import ImageTokens, Resampler, embeddings, fitted, masks

TOKENS = {"base": 4, "plus": 16}


@dataclass(frozen=True)
class IPAdapter(Method):
    """y = Attn(q, K, V) + s·Attn(q, c W_k', c W_v') with the picture's tokens c; q and the output projection are the host's.

    Tokens: `base` makes them of the picture's embedding e by LayerNorm(W e), `plus` of all patches by a resampler with queries of
    its own. W_k', W_v' begin as the host's own for the text. Given with `condition(image=…)` or `condition(embeds=…)`.

    Args:
        kind: `base` or `plus`. `width`: of the embeddings of a picture (ViT-H 1024) or of its patches (1280).
        tokens: for each picture; 0 for the usual 4 or 16.
        depth: blocks of the resampler.
        dim: width of the resampler, whose heads have 64; 0 for the text's width, at most 1280.
        zero_start: W_v' begins as zeros, so that a new one changes nothing. False: as the host's, as the paper has it.
    Given are pictures, which the pipeline's `image_encoder` embeds, or `embeds` of (pictures, width), for `plus` (pictures,
    patches, width); one for all samples or one for each prompt; several for one prompt as a list in the list, or (pictures,
    several, …).
    `negative` are those of the half without a prompt, else zeros. `mask`: where each of the several acts. `layers`: stage or name
    pattern of a block to its strength, such as `{"*": 0.0, "up.0": 1.0}`; the last that matches counts.
    Counts: SD 1.5 22,319,616, with embeddings of 1024; plus 49,087,488, with patches of 1280.
    Source: Ye et al., arXiv 2308.06721, equations 4 and 5. Deviation: `zero_start`.
    """

    name: ClassVar[str] = "ip_adapter"
    paper: ClassVar[str] = "Ye et al., IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models, 2023"
    needs: ClassVar[tuple[Need, ...]] = (Need(AttentionSite, where={"cross": True}),)
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
        """What makes the tokens of a picture."""
        widths = {site.context_width for site in sites}
        if len(widths) > 1:
            message = f"ip_adapter: the layers' contexts are {sorted(widths)} wide; choose those of one width with where=…"
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
        """2·D·context a layer."""
        return 2 * site.width * site.context_width

    def parse_conditions(self, sites: Sequence[Site], pipeline: Any, **conditions: Any) -> ParsedConditions:
        """Embeddings (pictures, several, …), those of the half without a prompt, and masks (pictures, several, height, width)."""
        given, negative = embeddings(conditions, pipeline, self.kind == "plus")
        for name, value in (("embeds", given), ("negative", negative)):
            if value.shape[-1] != self.width:
                raise ConditionError(
                    f"ip_adapter: {name} are {value.shape[-1]} wide; it was made for {self.width}, those of one encoder.",
                    where=name,
                    given=value.shape[-1],
                    expected=self.width,
                )
        values = {"embeds": given, "negative": negative.expand_as(given)}
        if conditions.get("mask") is not None:
            values["mask"] = masks(conditions["mask"], *given.shape[:2])
        return values, {"layers": _layers(conditions.get("layers") or {}, sites)}

    def prepare_call(self, adapters: Sequence[tuple[Site, Adapter]]) -> None:
        """Make the tokens of this call's pictures, once for all layers."""
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
        """An embedding of noise."""
        like = next(p for _, a in adapters for p in a.parameters())
        shape = (1, 1, 3, self.width) if self.kind == "plus" else (1, 1, self.width)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(like.device)
        return {"embeds": drawn, "negative": torch.zeros_like(drawn)}


class IPAdapterLayer(Adapter):
    """W_k' and W_v' of one layer, and the attention to the picture's tokens (batch, several, tokens, context)."""

    blends: ClassVar[bool] = True

    def __init__(self, site: AttentionSite, zero_start: bool) -> None:
        super().__init__()
        self.site, self.zero_start = site, zero_start
        self.to_k_ip = nn.Linear(site.context_width, site.width, bias=False)
        self.to_v_ip = nn.Linear(site.context_width, site.width, bias=False)

    @torch.no_grad()
    def enter(self, tower: nn.Module) -> None:
        """Begin as the layer's own projections of the text."""
        if values_follow():
            return
        for own, name in ((self.to_k_ip, "to_k"), (self.to_v_ip, "to_v")):
            own.weight.copy_(base_tensor(tower, f"{self.site.path}.{name}", "weight"))
        if self.zero_start:
            self.to_v_ip.weight.zero_()

    def attend(self, inner: Any, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's attention, and beside it that to the picture: `to_out` is linear, and may be applied to both apart."""
        y: Tensor = inner(attn, hidden_states, *args, **kwargs)
        strength = self.conditions.strength * self.conditions.options.get("layers", {}).get(self.site.name, 1.0)
        if strength == 0:
            return y
        seen = self.see(attn, hidden_states)
        out = attn.to_out[0]
        change = out(seen) - out(seen.new_zeros(1, 1, seen.shape[-1]))
        return y + (self.strength * strength).to(y.dtype) * (change / attn.rescale_output_factor).to(y.dtype)

    def see(self, attn: Any, hidden_states: Tensor) -> Tensor:
        """Attn(q, c W_k', c W_v'), (batch, length, width); with masks, picture by picture."""
        q = attn.to_q(hidden_states)
        q = self._heads(q if attn.norm_q is None else attn.norm_q(q))
        tokens = self.call.prepared.to(self.to_k_ip.weight.dtype)
        k, v = (project(tokens).to(q.dtype) for project in (self.to_k_ip, self.to_v_ip))
        mask = self.conditions.values.get("mask")
        if mask is None:
            return self._attention(q, k.flatten(1, 2), v.flatten(1, 2))
        fit = fitted(mask, hidden_states.shape[1]).to(q.dtype)
        parts = [self._attention(q, k[:, i], v[:, i]) * fit[:, i, :, None] for i in range(k.shape[1])]
        return torch.stack(parts).sum(0)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, self._heads(k), self._heads(v)).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.site.heads, -1)).transpose(1, 2)


def _layers(given: Mapping[str, float], sites: Sequence[Site]) -> dict[str, float]:
    """Strength of each layer by its name.

    Raises:
        ConditionError: a pattern is of no layer.
    """
    found: dict[str, float] = {}
    for pattern, strength in given.items():
        meant = [s.name for s in sites if fnmatchcase(s.stage or "", pattern) or fnmatchcase(s.name, pattern)]
        if not meant:
            stages = ", ".join(dict.fromkeys(s.stage or s.name for s in sites))
            raise ConditionError(
                f"ip_adapter: layers has {pattern!r}, which is no block; there are {stages}, or names of layers.",
                where="layers",
                given=pattern,
                expected=tuple(dict.fromkeys(s.stage or s.name for s in sites)),
            )
        found |= dict.fromkeys(meant, float(strength))
    return found
