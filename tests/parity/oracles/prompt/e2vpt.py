"""E²VPT beside its authors' transformer: prompts, importance and pruning."""

from __future__ import annotations

import copy
import types
from typing import Any

import timm.layers
import torch
from torch import nn

from tests.parity.measure import Row, largest_difference, measure
from tests.parity.models import DEPTH, HEADS, WIDTH, images, link, vits
from tests.parity.oracle import Repository, modules, options
from veneer.injection import attach

ORACLE = Repository("ChengHan111/E2VPT", "7a66e75eef6b7e15df83463d31b60eba5938d208")
METHODS = ("e2vpt",)
PACKAGES = (
    "e2",
    "e2.src",
    "e2.src.models",
    "e2.src.models.vit_backbones",
    "e2.src.models.vit_prompt",
    "e2.src.configs",
    "e2.src.utils",
)
SEGMENTS = 8
OPTIONS = {
    "LOCATION": "prepend", "INITIATION": "random", "NUM_DEEP_LAYERS": None, "DEEP_SHARED": False, "NUM_TOKENS_P": 4,
    "MASK_CLS_TOKEN": True, "CLS_TOKEN_MASK": True, "CLS_TOKEN_MASK_PIECES": True, "CLS_TOKEN_P_PIECES_NUM": SEGMENTS,
    "REWIND_STATUS": False, "DROPOUT_P": 0.0, "PROJECT": -1, "DEEP_P": True, "NUM_TOKENS": 3, "SHARE_PARAM_KV": True,
    "ORIGIN_INIT": 2, "QUERY_PROMPT_MODE": 0,
    "DROPOUT": 0.0,
    "LAYER_BEHIND": True, "SHARED_ACCROSS": False, "DEEP": True, "MASK_CLS_TOKEN_ON_VK": False,
}  # fmt: skip


class ConfigDict(dict[str, Any]):
    """Attributes as keys, as in ml_collections."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError as error:
            raise AttributeError(key) from error


def rows() -> list[Row]:
    """Two blocks of a ViT, before and after pruning."""
    model, bare = vits(num_classes=0)
    theirs = _transformer(bare)
    tuned = attach(model, "e2vpt", tokens=4, key_values=3, dropout=0.0, segments=SEGMENTS)
    prompts: Any = [tuned.parts[f"blocks.{i}.tokens"][1] for i in range(DEPTH)]
    tables: Any = [tuned.parts[f"blocks.{i}.attn.module"][1] for i in range(DEPTH)]
    embeddings = (theirs.prompt_embeddings, theirs.deep_prompt_embeddings)
    pairs: Any = [(ours.prompt, _first(tensor)) for ours, tensor in zip(prompts, embeddings, strict=True)]
    pairs += [
        (ours.prompt, link(layer.attn.deep_QKV_embeddings)) for ours, layer in zip(tables, theirs.encoder.layer, strict=True)
    ]
    difference = measure(lambda: model(images()), lambda: theirs(images())[0][:, 0], pairs)
    importance = sum(ours.sensitivity() for ours in prompts)
    masks = (theirs.prompt_soft_tokens_pieces_mask_cls_token.grad, theirs.prompt_soft_tokens_mask_cls_token.grad)
    scores = largest_difference([(importance, masks[0]), (importance.sum(1), masks[1])])
    return [
        Row("e2vpt", "a ViT: outputs, gradients", difference),
        Row("e2vpt", "importance of tokens and segments", scores),
        Row("e2vpt", "a pruned ViT: outputs", _pruned(model, theirs, prompts)),
    ]


def _pruned(model: Any, theirs: Any, prompts: Any) -> float:
    with torch.no_grad():
        theirs.mask_soft_tokens([1])
        theirs.mask_soft_tokens_pieces({0: [2, 5], 3: [0, SEGMENTS - 1]})
        for ours in prompts:
            ours.kept_tokens[1] = 0
            ours.kept_segments[0, [2, 5]] = 0
            ours.kept_segments[3, [0, SEGMENTS - 1]] = 0
            ours.prune()
        return largest_difference([(model(images()), theirs(images())[0][:, 0])])


def _transformer(bare: Any) -> Any:
    logging = options(get_logger=lambda name: None)
    empty: dict[str, Any] = {name.replace(".", "__"): {} for name in PACKAGES}
    empty["e2__src__utils"] = {"logging": logging}
    stand_ins = {"turtle": {"forward": None}, "timm__models__layers": {"trunc_normal_": timm.layers.trunc_normal_}}
    with modules(**empty, **stand_ins, ml_collections={"ConfigDict": ConfigDict}, torchvision={}):
        for path in ("configs/vit_configs", "models/vit_backbones/vit", "models/vit_backbones/vit_changeVK"):
            ORACLE.module(f"src/{path}.py", f"e2.src.{path.replace('/', '.')}")
        code = ORACLE.module("src/models/vit_prompt/vit_prompt_VK.py", "e2.src.models.vit_prompt.vit_prompt_VK")
    config = copy.deepcopy(next(iter(code.CONFIGS.values())))
    config.hidden_size, config.patches.size = WIDTH, (8, 8)
    shape = {"num_layers": DEPTH, "num_heads": HEADS, "mlp_dim": 4 * WIDTH, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
    config.transformer.update(shape)
    theirs = code.PromptedTransformer_Prompt_VK(types.SimpleNamespace(**OPTIONS), config, 32, False).double()
    theirs.eval()  # returns None there
    with torch.no_grad():
        _copy(theirs, bare)
        prompts = [
            theirs.prompt_embeddings,
            theirs.deep_prompt_embeddings,
            *(a.attn.deep_QKV_embeddings for a in theirs.encoder.layer),
        ]
        for tensor in prompts:
            tensor.normal_(std=0.3)
    return theirs


def _copy(theirs: Any, bare: Any) -> None:
    embeddings = theirs.embeddings
    embeddings.patch_embeddings.load_state_dict(bare.patch_embed.proj.state_dict())
    embeddings.cls_token.copy_(bare.cls_token)
    embeddings.position_embeddings.copy_(bare.pos_embed)
    pairs: list[tuple[nn.Module, nn.Module]] = [(theirs.encoder.encoder_norm, bare.norm)]
    for layer, block in zip(theirs.encoder.layer, bare.blocks, strict=True):
        projections = (layer.attn.query, layer.attn.key, layer.attn.value)
        for linear, weight, bias in zip(projections, block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        pairs += [(layer.attn.out, block.attn.proj), (layer.attention_norm, block.norm1), (layer.ffn_norm, block.norm2)]
        pairs += [(layer.ffn.fc1, block.mlp.fc1), (layer.ffn.fc2, block.mlp.fc2)]
    for ours, source in pairs:
        ours.load_state_dict(source.state_dict())


def _first(tensor: Any) -> Any:
    return lambda read: read(tensor)[0]
