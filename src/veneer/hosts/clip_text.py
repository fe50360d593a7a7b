"""Text encoders of diffusion pipelines: transformers' CLIP text models and T5 encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, ClassVar

from torch import Tensor, nn

from veneer.injection.attention_sites import TextReaders
from veneer.injection.host import Host, module_names
from veneer.injection.sites import Port, Site, VocabularySite

from ._describe import SampleInputs, TowerPart
from .diffusers_unet import text_readers

FAMILIES = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
CLIP_MLP = {"fc1": "mlp.in", "fc2": "mlp.out"}
T5_MLP = {"wi": "mlp.in", "wi_0": "mlp.in", "wi_1": "mlp.gate", "wo": "mlp.out"}


class ClipText(Host):
    """CLIPTextModel, CLIPTextModelWithProjection (with and without the `text_model` level) and T5EncoderModel.

    Models with task heads and decoders have other classes and are not supported.
    """

    name: ClassVar[str] = "clip_text"
    tower: ClassVar[str] = "text"
    library: ClassVar[str] = "transformers"
    main: ClassVar[bool] = False

    def matches(self, model: nn.Module) -> bool:
        return any(n.startswith("transformers.") and n.rpartition(".")[2] in FAMILIES for n in module_names(model))

    def sites(self, model: nn.Module, component: str = "", components: Mapping[str, Any] | None = None) -> Iterator[Site]:
        part = TowerPart(model, self.tower, component)
        tokenizer = (components or {}).get(component.replace("text_encoder", "tokenizer")) if component else None
        if part.module("encoder.block") is not None:
            return _t5(part, tokenizer)
        return clip_sites(part, tokenizer, text_readers(components or {}) if component else TextReaders())

    def sample(self, model: nn.Module) -> dict[str, Any]:
        bare: Any = model
        return {"input_ids": sample_ids(SampleInputs(model), bare.config)}

    def tiny(self) -> dict[str, Callable[[], nn.Module]]:
        return {
            "clip": lambda: _build("CLIPTextModel"),
            "clip_with_projection": lambda: _build("CLIPTextModelWithProjection"),
            "t5": _build_t5,
        }


def sample_ids(draw: SampleInputs, config: Any) -> Tensor:
    """Token ids (2, length) for the config of a text model, that end with the end token."""
    length = min(8, getattr(config, "max_position_embeddings", 8))
    last = config.vocab_size - 1
    ids = draw.ids(3, last, 2, length)
    # CLIP pools at the end token: the configured one, or, for the legacy value 2, the largest id.
    ids[:, -1] = config.eos_token_id if config.eos_token_id not in (None, 2) and config.eos_token_id <= last else last
    return ids


def _build(cls: str) -> nn.Module:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, projection_dim=12,
        max_position_embeddings=16, bos_token_id=62, eos_token_id=63, pad_token_id=63,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, cls)(config)
    return model.eval()


def _build_t5() -> nn.Module:
    import transformers

    config = transformers.T5Config(
        vocab_size=64, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
    )  # fmt: skip
    model: nn.Module = transformers.T5EncoderModel(config)
    return model.eval()


def clip_sites(part: TowerPart, tokenizer: Any, readers: TextReaders | None = None) -> Iterator[Site]:
    """The sites of a CLIP or SigLIP text tower, bare or at `text_model`. `readers`: the modules that read its text states."""
    root = "text_model." if part.module("text_model") is not None else ""
    yield from _vocabulary(part, f"{root}embeddings.token_embedding", tokenizer, readers)
    yield from part.layer(f"{root}embeddings.position_embedding", "embed.position")
    start = int(part.module("text_model.head") is None)  # SigLIP, which has a head, has no start token
    for depth in range(len(part.module(f"{root}encoder.layers"))):
        yield from _clip_block(part.at(depth=depth), f"{root}encoder.layers.{depth}", start)
    yield from part.norm(f"{root}final_layer_norm")
    if root:
        yield from part.layer(f"{root}head", "proj.out")
    yield from part.layer("text_projection", "proj.out")


def _clip_block(part: TowerPart, path: str, start: int) -> Iterator[Site]:
    """A block. `start`: 1 if texts begin with a start token, else 0."""
    attn, mlp = f"{path}.self_attn", f"{path}.mlp"
    width = part.module(attn).embed_dim
    yield from part.norm(f"{path}.layer_norm1")
    layers = (part.layer(f"{attn}.{x}_proj", f"attn.{x}", inert_bias=x == "k") for x in "qkv")
    yield from part.self_attention(attn, chain(*layers, part.layer(f"{attn}.out_proj", "attn.out")))
    yield part.branch(attn, "attn", Port(f"{path}.layer_norm1", "in"), Port(attn, "out"), width)
    yield from part.norm(f"{path}.layer_norm2")
    for name, role in CLIP_MLP.items():
        yield from part.layer(f"{mlp}.{name}", role)
    yield part.branch(mlp, "mlp", Port(f"{path}.layer_norm2", "in"), Port(mlp, "out"), width)
    yield part.stream(path, width, prefix_tokens=start)


def _t5(part: TowerPart, tokenizer: Any) -> Iterator[Site]:
    """T5 calls `encoder.embed_tokens`; `shared` is an alias of the same table and has no site."""
    yield from _vocabulary(part, "encoder.embed_tokens", tokenizer)
    for depth in range(len(part.module("encoder.block"))):
        yield from _t5_block(part.at(depth=depth), f"encoder.block.{depth}")
    yield from part.norm("encoder.final_layer_norm")


def _t5_block(part: TowerPart, path: str) -> Iterator[Site]:
    attn, mlp = f"{path}.layer.0", f"{path}.layer.1"
    width = part.module(f"{attn}.SelfAttention").d_model
    yield from part.norm(f"{attn}.layer_norm")
    for x, role in {"q": "attn.q", "k": "attn.k", "v": "attn.v"}.items():
        yield from part.layer(f"{attn}.SelfAttention.{x}", role)
    yield from part.layer(f"{attn}.SelfAttention.relative_attention_bias", "embed.position")
    yield from part.layer(f"{attn}.SelfAttention.o", "attn.out")
    yield part.branch(attn, "attn", Port(f"{attn}.layer_norm", "in"), Port(f"{attn}.dropout", "out"), width)
    yield from part.norm(f"{mlp}.layer_norm")
    for name, role in T5_MLP.items():
        yield from part.layer(f"{mlp}.DenseReluDense.{name}", role)
    yield part.branch(mlp, "mlp", Port(f"{mlp}.layer_norm", "in"), Port(f"{mlp}.dropout", "out"), width)
    yield part.stream(path, width)


def _vocabulary(part: TowerPart, path: str, tokenizer: Any, readers: TextReaders | None = None) -> Iterator[Site]:
    table = part.module(path)
    yield VocabularySite(
        name=f"{path}.vocabulary", role="vocabulary", path=path, ids=Port("", "in"), rows=table.num_embeddings,
        width=table.embedding_dim, tokenizer=tokenizer, readers=readers, **part.labels,
    )  # fmt: skip
    yield from part.layer(path, "embed.token")
