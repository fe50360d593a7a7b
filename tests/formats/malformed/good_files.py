"""The files that are mutated: at least one of every readable format, and of each method that a format holds."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.cases import fill
from tests.formats.malformed import meanings, peft_meanings
from tests.formats.malformed.meanings import Base, Files, Meaning
from tests.formats.malformed.models import base, flux, model
from veneer.formats import formats
from veneer.injection import attach

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Good:
    """A good file.

    Args:
        format, model: names of the file's format and of its model. `files`: their bytes by name, the main one first.
        meaning: reference reading of the files. `base`: of that reading.
    """

    name: str
    format: str
    model: str
    files: Files = field(repr=False)
    meaning: Callable[[Files, Base], Meaning]
    base: Base = field(repr=False)

    @property
    def main(self) -> str:
        return next(iter(self.files))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of mutations of it, besides those of its bytes."""
        if self.main.endswith(".png"):
            return ("picture",)
        told = any(key in self.files[self.main] for key in (b'"veneer"', b"lora_adapter_metadata", b'"tokens"', b"CLIPAttention"))
        return ("tensors", "json") if told or len(self.files) > 1 else ("tensors",)


def tuned(kind: str, method: str, where: Sequence[str], **options: Any) -> Any:
    return fill(attach(model(kind), method, where=[f"name:{n}" for n in where], **options), std=0.2)


def files_in(folder: Path) -> dict[str, bytes]:
    """The bytes of each file by its name, the tensors first."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.name: p.read_bytes() for p in sorted(found, key=lambda p: p.suffix != ".safetensors")}


def saved(name: str, format: str, kind: str, made: Sequence[Any], place: Path, meaning: Any, base: Base) -> Good:
    """A file by the format's own `save`; its attachment is detached again."""
    place.mkdir(parents=True)
    formats.get(format)().save(made if len(made) > 1 else made[0], place / "x.safetensors")
    for attachment in reversed(made):
        attachment.detach()
    return Good(name, format, kind, files_in(place), meaning, base)


def written(
    name: str, format: str, kind: str, tensors: Mapping[str, Tensor], place: Path, meaning: Any, base: Base, /, **meta: str
) -> Good:
    """A file of a read-only format, or with more than veneer saves."""
    place.mkdir(parents=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, place / "x.safetensors", meta or None)
    return Good(name, format, kind, files_in(place), meaning, base)


A, B = "lora_A.weight", "lora_B.weight"
ATTN = "text_encoder.encoder.layers.0.self_attn."
VOCABULARY = ["text_encoder.embeddings.token_embedding.vocabulary"]
TWO = [f"{ATTN}q_proj", "text_encoder.encoder.layers.0.mlp.fc1"]


def good_files(folder: Path) -> list[Good]:
    """All good files. `folder`: where they are saved."""
    return [*_native(folder), *_text(folder), *_flux(folder), *_lycoris(folder), *_peft(folder)]


def _native(folder: Path) -> Iterator[Good]:
    own = base("small", lambda c, p: p)
    lora = {"rank": 2, "alpha": 3.0, "by_site": {"name:conv": {"rank": 3, "alpha": 1.5}}}

    def of(name: str, *made: Any) -> Good:
        return saved(f"native-{name}", "native", "small", made, folder / name, meanings.native, own)

    yield of("lora", tuned("small", "lora", ["conv", "fc"], train="name:out", **lora))
    pair = tuned("small", "lora", ["fc", "table"], rank=2, rslora=True), tuned("small", "loha", ["out", "fc"], rank=2, alpha=1.0)
    yield of("two", *pair)
    yield of("vera", tuned("small", "vera", ["fc", "out"], rank=3))
    words = [tuned("text", "textual_inversion", VOCABULARY, tokens="<cat>", vectors=2), tuned("text", "lora", TWO, rank=2)]
    text = base("text", lambda c, p: f"{c}.{p}")
    yield saved("native-words", "native", "text", words, folder / "words", meanings.native, text)


def _text(folder: Path) -> Iterator[Good]:
    def low() -> Any:
        return tuned("text", "lora", TWO, rank=3, alpha=2.0, by_site={f"name:{TWO[0]}": {"rank": 2}})

    def word(**options: Any) -> Any:
        return tuned("text", "textual_inversion", VOCABULARY, **options)

    under = base("text", lambda c, p: f"lora_te_text_model_{p.replace('.', '_')}")
    comfy = base("text", lambda c, p: f"text_encoders.clip_l.transformer.text_model.{p}")
    dotted = base("text", lambda c, p: f"text_encoder.text_model.{p}")
    yield saved("kohya", "kohya", "text", [low()], folder / "kohya", meanings.onetrainer, under)
    yield saved("comfyui", "comfyui", "text", [low()], folder / "comfyui", meanings.by_ends(meanings.AB), comfy)
    both = [word(tokens="cat~", vectors=2), low()]
    yield saved("onetrainer", "onetrainer", "text", both, folder / "onetrainer", meanings.onetrainer, under)
    yield saved("diffusers", "diffusers", "text", [low()], folder / "diffusers", peft_meanings.diffusers, dotted)
    dora = tuned("text", "dora", TWO, rank=2, alpha=3.0)
    yield saved("diffusers-dora", "diffusers", "text", [dora], folder / "diffusers-dora", peft_meanings.diffusers, dotted)
    path = "text_encoder.text_model.encoder.layers.0."
    query, fc1 = f"{path}self_attn.q_proj.", f"{path}mlp.fc1."
    shapes = {query + A: (2, 8), query + B: (8, 2), fc1 + A: (3, 8), fc1 + B: (12, 3), fc1 + "alpha": ()}
    yield written(
        "diffusers-plain", "diffusers", "text", _of(shapes), folder / "diffusers-plain", peft_meanings.diffusers, dotted
    )
    to_old = {f"{path}self_attn.q_proj": f"{path}self_attn.to_q_lora", f"{path}mlp.fc1": f"{path}mlp.fc1.lora_linear_layer"}
    old = base("text", lambda c, p: to_old.get(f"{c}.text_model.{p}", f"{c}.text_model.{p}"))
    pairs = zip(to_old.values(), (8, 12), strict=True)
    shapes = {f"{n}.{half}.weight": s for n, rows in pairs for half, s in (("down", (2, 8)), ("up", (rows, 2)))}
    yield written("diffusers_old", "diffusers_old", "text", _of(shapes), folder / "old", meanings.by_ends(meanings.HALVES), old)
    order = [f"text_encoder/encoder.layers.0.self_attn.{x}_proj.weight" for x in ("k", "v", "q", "out")]
    numbered = meanings.Base(under.weights, {str(i): (key,) for i, key in enumerate(order)}, widths=under.widths)
    shapes = {f"text_encoder:{i}:{half}": s for i in range(4) for half, s in (("down", (2, 8)), ("up", (8, 2)))}
    tokens = {"<s1>": (8,), "<s2>": (8,)}
    meta = {"text_encoder": '["CLIPAttention"]', **dict.fromkeys(tokens, "<embed>")}
    clone = _of({**shapes, **tokens})
    yield written("cloneofsimo", "cloneofsimo", "text", clone, folder / "clone", meanings.cloneofsimo, numbered, **meta)
    two = [word(tokens=("<b>", "<a>"), vectors=2)]
    yield saved("embeddings", "embeddings", "text", two, folder / "embeddings", meanings.embeddings, under)
    single = {"emb_params": (3, 8)}
    yield written("embeddings-unnamed", "embeddings", "text", _of(single), folder / "unnamed", meanings.embeddings, under)
    for packed in (False, True):
        yield Good(f"picture{'-packed' * packed}", "embeddings", "text", {"x.png": _picture(packed)}, meanings.picture, under)


def _of(shapes: Shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes.items()}


def _picture(packed: bool) -> bytes:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    rows = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).tolist()
    word = {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": rows}}, "name": "my-cat", "step": 5}
    info, stream = PngInfo(), io.BytesIO()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(word).encode()).decode(), zip=packed)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def _flux(folder: Path) -> Iterator[Good]:
    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    sites = [f"{double}attn.to_q", f"{double}attn.to_v", f"{double}attn.to_out.0", f"{single}proj_out"]

    def low() -> Any:
        return tuned("flux", "lora", sites, rank=2, alpha=3.0)

    yield saved("kohya-flux", "kohya", "flux", [low()], folder / "kohya-flux", meanings.by_ends(meanings.KOHYA), flux("kohya"))
    yield saved("xlabs", "xlabs", "flux", [low()], folder / "xlabs", meanings.by_ends(meanings.HALVES), flux("xlabs"))
    adaptive = tuned("flux", "lora", [sites[0], "norm_out.linear"], rank=2)
    yield saved(
        "comfyui-flux", "comfyui", "flux", [adaptive], folder / "comfyui-flux", meanings.by_ends(meanings.AB), flux("comfyui")
    )
    rows = {"double_blocks.0.img_attn.qkv": 24, "double_blocks.0.img_attn.proj": 8, "final_layer.adaLN_modulation.1": 16}
    shapes = {f"{n}.{half}.weight": s for n, count in rows.items() for half, s in (("lora_A", (2, 8)), ("lora_B", (count, 2)))}
    yield written("bfl", "bfl", "flux", _of(shapes), folder / "bfl", meanings.by_ends(meanings.AB), flux("bfl"))


def _lycoris(folder: Path) -> Iterator[Good]:
    own = base("small", lambda c, p: f"lycoris_{p}")

    def of(name: str, tensors: dict[str, torch.Tensor]) -> Good:
        return written(
            f"lycoris-{name}", "lycoris", "small", tensors, folder / f"lycoris-{name}", meanings.by_ends(meanings.ENDS), own
        )

    alphas = {f"lycoris_{n}.alpha": torch.tensor(1.5) for n in ("conv", "fc", "out")}
    fc, out, conv = "lycoris_fc.", "lycoris_out.", "lycoris_conv."
    down, up, mid = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
    low = {fc + down: (2, 6), fc + up: (8, 2), conv + down: (3, 2, 1, 1), conv + mid: (3, 3, 3, 3), conv + up: (6, 3, 1, 1)}
    yield of("lora", {**_of(low), conv + "alpha": alphas[conv + "alpha"]})
    yield of("dora", {**_of({fc + down: (2, 6), fc + up: (8, 2), fc + "dora_scale": (8, 1)}), fc + "alpha": torch.tensor(3.0)})
    inputs = {fc + down: (2, 6), fc + up: (8, 2), fc + "dora_scale": (1, 6)}
    yield of("dora-input", {**_of(inputs), fc + "alpha": torch.tensor(3.0)})
    hada = {fc + "hada_w1_a": (8, 2), fc + "hada_w1_b": (2, 6), fc + "hada_w2_a": (8, 2), fc + "hada_w2_b": (2, 6)}
    tucker = {
        f"{conv}hada_{k}{i}{x}": s
        for i in "12"
        for k, x, s in (("t", "", (2, 2, 3, 3)), ("w", "_a", (2, 6)), ("w", "_b", (2, 2)))
    }
    yield of("loha", {**_of({**hada, **tucker}), fc + "alpha": torch.tensor(1.5)})
    yield of("loha-dora", {**_of({**hada, **tucker, fc + "dora_scale": (1, 6)}), fc + "alpha": torch.tensor(1.5)})
    kron = {fc + "lokr_w1": (2, 2), fc + "lokr_w2_a": (4, 2), fc + "lokr_w2_b": (2, 3)}
    kron |= {out + "lokr_w1": (2, 2), out + "lokr_w2": (2, 4)}
    core = {conv + "lokr_w1": (2, 2), conv + "lokr_w2_a": (2, 3), conv + "lokr_w2_b": (2, 1), conv + "lokr_t2": (2, 2, 3, 3)}
    yield of("lokr", {**_of({**kron, **core}), fc + "alpha": torch.tensor(1.5)})
    yield of("lokr-dora", _of({**kron, out + "dora_scale": (4, 1)}))
    turns = _of({fc + "oft_blocks": (2, 4, 4), fc + "rescale": (8, 1), out + "oft_blocks": (1, 4, 4)})
    yield of("oft", {**turns, out + "alpha": torch.tensor(0.01)})
    yield of("boft", _of({fc + "oft_blocks": (2, 4, 2, 2), fc + "rescale": (8, 1)}))
    terms = {out + "a1.weight": (8, 2), out + "a2.weight": (2, 8), out + "b1.weight": (4, 2), out + "b2.weight": (2, 8)}
    yield of("glora", {**_of(terms), out + "alpha": torch.tensor(1.5)})
    flags = {fc + "on_input": torch.tensor(1), out + "on_input": torch.tensor(0)}
    yield of("ia3", {**_of({fc + "weight": (6,), out + "weight": (4,)}), **flags})


def _peft(folder: Path) -> Iterator[Good]:
    own = base("small", lambda c, p: p)

    def of(method: str, *where: str, form: str = "", **options: Any) -> Good:
        made, name = [tuned("small", method, where, **options)], f"peft-{method}{form}"
        return saved(name, "peft_folder", "small", made, folder / name, peft_meanings.peft, own)

    yield of("lora", "table", "conv", "fc", rank=2, alpha=3.0, by_site={"name:fc": {"rank": 3, "alpha": 1.5}})
    yield of("dora", "fc", "out", rank=2, alpha=3.0)
    yield of("loha", "fc", "out", rank=2, alpha=3.0)
    yield of("lokr", "fc", "out", rank=1, alpha=3.0, factor=2)
    yield of("oft", "fc", "out", block_size=2)
    yield of("oft", "fc", "out", form="-series", block_size=2, neumann_terms=5)
    yield of("boft", "out", m=1, b=4)
    yield of("ia3", "fc", "out", inputs=("mlp.in",))
    yield of("vera", "fc", "out", rank=3)
    yield of("glora", "fc", "fc.bias", "out", rank=2)
