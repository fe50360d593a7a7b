"""The canonical roles, shared by all hosts."""

from __future__ import annotations

from veneer.injection.attention_sites import AttentionSite, SelfAttentionSite
from veneer.injection.sites import (
    BranchSite,
    FeatureSite,
    NormSite,
    ParamSite,
    PixelSite,
    PromptSite,
    ResidualSite,
    Site,
    StreamSite,
    TokenSite,
    VocabularySite,
    WeightSite,
)

PROJECTIONS = {
    f"{kind}.{x}" for kind in ("attn", "xattn", "attn.context", "xattn.context") for x in ("q", "k", "v", "out", "qkv")
}
WEIGHTS = PROJECTIONS | {
    "attn.kv", "xattn.kv", "attn.gate", "xattn.gate",
    "mlp.in", "mlp.out", "mlp.gate", "mlp.in_gate", "mlp.conv", "mlp.context.in",
    "mlp.context.gate", "mlp.context.in_gate", "mlp.context.out", "single.in", "single.out", "proj.in", "proj.out", "conv.res",
    "conv.sample", "conv.io", "conv.patch", "conv.stem", "conv.dw", "conv.pw", "conv.route", "se.in", "se.out", "embed.merge",
    "time.res", "time.embed", "class.embed", "adaln", "embed.patch", "embed.context", "embed.token", "embed.position", "head",
    "pool.q", "pool.k", "pool.v", "pool.kv", "pool.qkv", "pool.out", "pool.mlp.in", "pool.mlp.out",
}  # fmt: skip
PARAMS = {
    "norm", "norm.qk", "scale", "adaln.table", "embed.class", "embed.distil", "embed.register", "embed.position", "embed.pool",
    "proj.out", "logit.scale", "logit.bias", "other", "bias.norm", "bias.norm.qk", *(f"bias.{role}" for role in WEIGHTS),
}  # fmt: skip
ROLES: dict[type[Site], set[str]] = {
    WeightSite: WEIGHTS,
    ParamSite: PARAMS,
    BranchSite: {"attn", "xattn", "mlp", "attn.context", "mlp.context", "single", "conv"},
    StreamSite: {"block", "sample"},
    TokenSite: {"tokens.block", "tokens.tower"},
    AttentionSite: {"attn.processor", "xattn.processor"},
    SelfAttentionSite: {"attn.module"},
    VocabularySite: {"vocabulary"},
    PromptSite: {"prompts"},
    PixelSite: {"pixels"},
    FeatureSite: {"features", "logits"},
    NormSite: {"norm", "norm.qk"},
    ResidualSite: {"residual"},
}
