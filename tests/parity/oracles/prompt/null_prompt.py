"""Null prompts of a CLIP beside transformers' CLIP, with the biases that the authors' trainer selects."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from tests.parity.clip import NAMES, perturbed_classifier, tokenize
from tests.parity.measure import Row, measure, randn
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("ucinlp/null-prompts", "393cafa187e5472bc284827cdf047626d80ba7e2")
METHODS = ("null_prompt",)
RENAMES = {
    "transformer.resblocks.": "encoder.layers.", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm", "ln_final": "final_layer_norm", "attn.": "self_attn.", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2", "conv1": "embeddings.patch_embedding", "class_embedding": "embeddings.class_embedding",
    "token_embedding": "embeddings.token_embedding", "positional_embedding": "embeddings.position_embedding.weight",
    **{f"attn.{kind}.": f"attn.{kind}_proj." for kind in "qkv"},
}  # fmt: skip


def rows() -> list[Row]:
    """Logits of images, and gradients of all biases except those of keys, whose gradient is zero."""
    model: Any = perturbed_classifier()
    theirs = _transformers_clip(model.clip)
    trained = _trained(theirs)
    initial = {name: p.detach().clone() for name, p in trained.items()}
    tuned = attach(model, "null_prompt")
    parts = {_rename(name.removeprefix("clip.")): adapter for name, (_, adapter) in tuned.parts.items() if name != "head.prompts"}
    assert parts.keys() == trained.keys()
    assert sum(p.numel() for p in trained.values()) == sum(p.numel() for p in tuned.parameters())
    pairs: Any = []
    for seed, (name, p) in enumerate(trained.items()):
        p.data.add_(0.1 * randn(*p.shape, seed=seed))
        if "k_proj" in name:
            parts[name].delta.data.copy_(p - initial[name])
        else:
            pairs.append((parts[name].delta, lambda read, p=p, start=initial[name]: p - start if read(p) is p else read(p)))
    ids, images = tokenize(NAMES).long(), randn(3, 3, 32, 32)
    difference = measure(
        lambda: model(images), lambda: theirs(input_ids=ids, pixel_values=images, attention_mask=None).logits_per_image, pairs
    )
    text = "run are the authors' selection of biases and transformers' CLIP; their prompts are texts with a mask token"
    return [Row("null_prompt", "trained biases, prompts of names alone; a CLIP: logits, gradients", difference, deviations=text)]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The biases in the parameter groups of the authors' optimizer."""
    code = ORACLE.definitions(
        "nullprompt/trainers/continuous_mlm.py", "get_optimizer", transformers=options(AdamW=lambda groups, **o: groups)
    )
    groups = code.get_optimizer(model, {"finetune_mode": ["bitfit"], "lr": 1e-3, "finetune_lr": None})
    chosen = {id(p) for group in groups for p in group["params"]}
    return {name: p.requires_grad_(id(p) in chosen) for name, p in model.named_parameters() if id(p) in chosen}


def _transformers_clip(clip: Any) -> Any:
    """transformers' CLIP with the weights of open_clip's, in float64."""
    layers = {"num_hidden_layers": 4, "projection_dim": 32, "hidden_act": "quick_gelu"}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, **layers}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "vocab_size": 49408, **layers}
    text |= {"max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32, attn_implementation="sdpa")
    model: Any = CLIPModel(config).double().eval().requires_grad_(False)
    state = {}
    for name, value in clip.state_dict().items():
        if ".in_proj_" in name:
            end = name.rsplit("_", 1)[1]
            parts = [name.replace(f"in_proj_{end}", f"{kind}.{end}") for kind in "qkv"]
            state |= dict(zip(map(_rename, parts), value.chunk(3), strict=True))
        else:
            state[_rename(name)] = value.T if name in ("visual.proj", "text_projection") else value
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("position_ids" in key for key in missing.missing_keys)
    return model


def _rename(name: str) -> str:
    """Name of transformers for one of open_clip, with queries, keys and values apart."""
    if name in ("visual.proj", "text_projection", "logit_scale"):
        return {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}.get(name, name)
    tower, name = ("vision_model", name.removeprefix("visual.")) if name.startswith("visual.") else ("text_model", name)
    for old, new in sorted(RENAMES.items(), key=lambda pair: -len(pair[0])):
        name = name.replace(old, new)
    return f"{tower}.{name}"
