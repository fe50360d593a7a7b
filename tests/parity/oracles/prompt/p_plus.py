"""P+ beside the UNet of another implementation, whose cross-attention layers read a list of text states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.parity.measure import Row, measure, randn
from tests.parity.oracle import Repository, modules
from veneer.injection import attach
from veneer.testing.pipelines import tiny_pipeline

ORACLE = Repository("SeongMon/prompt-plus", "ba894f488a149e541c959991c3476b58da4f0e0f", third_party=("p_plus",))
METHODS = ("p_plus",)
PROMPT = "a photo of <toy> on the beach"
BLOCKS = ("down_block_types", "mid_block_type", "up_block_types")
DESIGN: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 24, 32),
}
"""The blocks of Stable Diffusion 1.5, which has 16 cross-attention layers."""


def rows() -> list[Row]:
    """One prompt with the new token, encoded once for each layer."""
    pipe, other = tiny_pipeline("sd", **DESIGN), tiny_pipeline("sd", **DESIGN)
    theirs = _unet(other.unet)
    tuned = attach(pipe, "p_plus", tokens="<toy>")
    for module in (pipe.text_encoder, pipe.unet, other.text_encoder, theirs):
        module.double()
    (vectors,) = tuned.parameters()
    tokens = [f"<layer{i}>" for i in range(vectors.shape[1])]
    table = _add_tokens(other, tokens)
    noisy, timestep = randn(1, 4, 8, 8), torch.tensor([37])

    def run() -> Any:
        states = [_encode(other, PROMPT.replace("<toy>", token)) for token in tokens]
        return theirs(noisy, timestep, encoder_hidden_states_list=states).sample

    def ours() -> Any:
        return pipe.unet(noisy, timestep, encoder_hidden_states=_encode(pipe, PROMPT)).sample

    difference = measure(ours, run, [(vectors, lambda read: read(table)[None, -len(tokens) :])])
    return [Row("p_plus", "UNet with the blocks of Stable Diffusion 1.5: outputs, gradients", difference)]


def _unet(unet: Any) -> Any:
    """The implementation's UNet with the weights of another."""
    with modules(prompt_plus={}, prompt_plus__prompt_plus_unet_2d_blocks={}):
        ORACLE.module("prompt_plus/prompt_plus_unet_2d_blocks.py", "prompt_plus.prompt_plus_unet_2d_blocks")
        code = ORACLE.module("prompt_plus/prompt_plus_unet_2d_condition.py", "prompt_plus_unet_2d_condition")
    config = {name: value for name, value in unet.config.items() if not name.startswith("_") and name not in BLOCKS}
    theirs = code.PPlusUNet2DConditionModel(**config).eval()
    theirs.load_state_dict(unet.state_dict())
    return theirs


def _add_tokens(pipe: Any, tokens: list[str]) -> nn.Parameter:
    """The embedding table of the text encoder, with rows for the tokens."""
    pipe.tokenizer.add_tokens(tokens)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table: nn.Parameter = pipe.text_encoder.get_input_embeddings().weight.requires_grad_()
    with torch.no_grad():
        table[-len(tokens) :] = randn(len(tokens), table.shape[1], seed=2)
    return table


def _encode(pipe: Any, prompt: str) -> Any:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]
