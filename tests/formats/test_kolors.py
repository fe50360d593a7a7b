"""LoRA of Kolors: its UNet is that of SDXL, with a projection of the tokens of ChatGLM before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from veneer import attach, load

CONFIG = {
    "sample_size": 8, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (16, 32), "layers_per_block": 1,
    "norm_num_groups": 4, "cross_attention_dim": 24, "encoder_hid_dim": 40, "encoder_hid_dim_type": "text_proj",
    "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 40,
}  # fmt: skip


LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(**CONFIG).eval()


def inputs() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(1)
    conditions = {"text_embeds": torch.randn(2, 40, generator=draw), "time_ids": 100 * torch.rand(2, 6, generator=draw)}
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([10, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 40, generator=draw),
        "added_cond_kwargs": conditions,
    }


def output(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**inputs()).sample
    return result


def test_a_file_of_kolors_is_read_as_peft_applies_it(tmp_path: Path) -> None:
    """Saved as by diffusers' training script of LoRA for Kolors, with the names of its UNet."""
    theirs = unet()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        theirs.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS, init_lora_weights=False))
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs))
    diffusers.StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=tensors)
    ours = unet()
    base = output(ours)
    loaded = load(ours, tmp_path / "pytorch_lora_weights.safetensors")
    assert loaded.loaded.clean
    torch.testing.assert_close(output(ours), output(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output(ours), base, atol=1e-2)
    loaded.detach()
    assert torch.equal(output(ours), base)


def test_adapters_of_kolors_get_gradients() -> None:
    model = unet()
    lora = attach(model, "lora", rank=2, where=("attn", "xattn", "embed.context"))
    assert "encoder_hid_proj" in lora.parts
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    model(**inputs()).sample.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in lora.parameters())
