"""A small diffusion transformer of this package's own, with the attention of diffusers."""

from __future__ import annotations

from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


class Block(nn.Module):
    """x + attn(norm1(x)), then x + ff(norm2(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(query_dim=width, heads=heads, dim_head=width // heads)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))


class ClayTransformer(nn.Module):
    """Tokens (batch, tokens, channels) and a time (batch,) to the velocity of the tokens."""

    def __init__(self, channels: int = 4, width: int = 16, heads: int = 2, depth: int = 2) -> None:
        super().__init__()
        self.img_in, self.time_in = nn.Linear(channels, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm_out, self.proj_out = nn.LayerNorm(width), nn.Linear(width, channels)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = self.img_in(hidden_states) + self.time_in(timestep[:, None])[:, None]
        for block in self.blocks:
            x = block(x)
        return self.proj_out(self.norm_out(x))
