"""Methods other than LoRA in OneTrainer's and ai-toolkit's files: weight updates, written out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import veneer
from tests.raising import raises
from veneer.formats import format_of, inspect, load_all, onetrainer, read
from veneer.injection import LoadError
from veneer.testing.pipelines import tiny_pipeline

ATTENTION = "transformer_blocks.0.attn.to_q"
# component, its prefix in OneTrainer's files, path in the file, path in the model
LAYERS = {
    "flux": [
        ("transformer", "lora_transformer", ATTENTION, ATTENTION),
        ("transformer", "lora_transformer", "single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.proj_out"),
        ("text_encoder", "lora_te1", "text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"),
        ("text_encoder_2", "lora_te2", *["encoder.block.0.layer.0.SelfAttention.k"] * 2),
    ],
    "sd3": [
        ("transformer", "lora_transformer", ATTENTION, ATTENTION),
        ("text_encoder_2", "lora_te2", *["text_model.encoder.layers.0.self_attn.v_proj"] * 2),
        ("text_encoder_3", "lora_te3", *["encoder.block.0.layer.0.SelfAttention.k"] * 2),
    ],
    "pixart": [
        ("transformer", "lora_transformer", *["transformer_blocks.0.attn1.to_q"] * 2),
        ("text_encoder", "lora_te", *["encoder.block.0.layer.0.SelfAttention.k"] * 2),
    ],
    "sd": [
        ("unet", "lora_unet", *["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] * 2),
        ("unet", "lora_unet", *["down_blocks.0.resnets.0.conv1"] * 2),
        ("text_encoder", "lora_te", "text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"),
    ],
}  # fmt: skip
Made = tuple[dict[str, Tensor], Tensor]  # tensors of a layer by the ends of their keys, and W' − W


def random(*shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape)


def loha(weight: Tensor) -> Made:
    rows, columns = weight.shape[0], weight[0].numel()
    one_a, one_b, two_a, two_b = random(rows, 3), random(3, columns), random(rows, 3), random(3, columns)
    found = {"hada_w1_a": one_a, "hada_w1_b": one_b, "hada_w2_a": two_a, "hada_w2_b": two_b, "alpha": torch.tensor(2.0)}
    shaped = {k: t.reshape(3, *weight.shape[1:]) if k.endswith("_b") else t for k, t in found.items()}
    return shaped, (2 / 3 * (one_a @ one_b) * (two_a @ two_b)).reshape(weight.shape)


def lokr(weight: Tensor) -> Made:
    rows, columns = weight.shape[:2]
    left, right = random(2, 2), random(rows // 2, columns // 2, *weight.shape[2:])
    whole = torch.kron(left.reshape(2, 2, *(1,) * (weight.ndim - 2)), right)
    return {"lokr_w1": left, "lokr_w2": right, "alpha": torch.tensor(4.0)}, whole


def pair(weight: Tensor) -> tuple[Tensor, Tensor]:
    return random(3, *weight.shape[1:]), random(len(weight), 3, *(1,) * (weight.ndim - 2))


def lora(weight: Tensor) -> Made:
    down, up = pair(weight)
    change = 2 / 3 * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}, change


def dora(weight: Tensor, end: str = "dora_scale") -> Made:
    """m·(W + s·B A) / ‖W + s·B A‖ by rows; ai-toolkit's `magnitude` is (d_out,), and its file has no alpha: s = 1."""
    down, up = pair(weight)
    alpha, length = 2.0 if end == "dora_scale" else 3.0, weight.flatten(1).norm(dim=1) * (1 + 0.3 * torch.rand(len(weight)))
    whole = weight.flatten(1) + alpha / 3 * up.flatten(1) @ down.flatten(1)
    after = (whole / whole.norm(dim=1, keepdim=True) * length[:, None]).reshape(weight.shape)
    m = length if end == "magnitude" else length.reshape(-1, *(1,) * (weight.ndim - 1))
    rest = {"alpha": torch.tensor(alpha)} if end == "dora_scale" else {}
    return {"lora_down.weight": down, "lora_up.weight": up, end: m, **rest}, after - weight


def input_dora(weight: Tensor) -> Made:
    """m·(W + s·B A) / ‖W + s·B A‖ by inputs, OneTrainer's default."""
    parts, change = lora(weight)
    whole, others = weight + change, [i for i in range(weight.ndim) if i != 1]
    length = torch.linalg.vector_norm(weight, dim=others, keepdim=True) * (
        1 + 0.3 * torch.rand(1, *weight.shape[1:2], *(1,) * (weight.ndim - 2))
    )
    return {**parts, "dora_scale": length}, whole / torch.linalg.vector_norm(whole, dim=others, keepdim=True) * length - weight


def oft(weight: Tensor, scaled: bool = False, share: bool = False, size: int = 4) -> Made:
    """R = I + 2Q + 2Q² + 2Q³ + Q⁴ per block; inputs of a linear layer are multiplied by R, kernels of a convolution too."""
    flat = weight.flatten(1).double()
    count = flat.shape[1] // size
    entries = random(1 if share else count, size * (size - 1) // 2)
    q = torch.zeros(len(entries), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = entries.double() / (2 * (size - 1) ** 0.5 if scaled else 1)
    q = q - q.mT
    r = torch.eye(size, dtype=torch.float64) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    blocks = torch.block_diag(*(r.expand(count, -1, -1)))
    after = flat @ (blocks if weight.ndim > 2 else blocks.mT)
    marks = {"oft_R.scaled_oft": torch.tensor(True)} if scaled else {}
    return {"oft_R.weight": entries, **marks}, (after - flat).float().reshape(weight.shape)


METHODS: dict[str, tuple[str, Callable[[Tensor], Made]]] = {
    "loha": ("loha", loha),
    "lokr": ("lokr", lokr),
    "lora": ("lora", lora),
    "dora": ("dora", dora),
    "dora of inputs": ("dora", input_dora),
    "oft": ("oft", oft),
    "scaled oft of a shared block": ("oft", lambda weight: oft(weight, scaled=True, share=True)),
}


def weight_of(pipe: Any, component: str, path: str) -> Tensor:
    layer: nn.Linear = getattr(pipe, component).get_submodule(path)
    return layer.weight.detach().clone()


def written(family: str, make: Callable[[Tensor], Made], path: Path, dotted: bool = False) -> dict[tuple[str, str], Tensor]:
    """A file with an update of every layer of `LAYERS`, and these updates by component and path."""
    torch.manual_seed(0)
    pipe, state, want = tiny_pipeline(family), {}, {}
    for component, prefix, name, own in LAYERS[family]:
        parts, want[component, own] = make(weight_of(pipe, component, own))
        start = f"{component}.{name}" if dotted else f"{prefix}_{name.replace('.', '_')}"
        state |= {f"{start}.{end}": tensor.contiguous() for end, tensor in parts.items()}
    save_file(state, path)
    return want


def assert_changes(family: str, path: Path, method: str, want: dict[tuple[str, str], Tensor]) -> None:
    pipe = tiny_pipeline(family)
    before = {key: weight_of(pipe, *key) for key in want}
    (loaded,) = load_all(pipe, path)
    assert loaded.method.name == method
    loaded.merge()
    for key, change in want.items():
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(weight_of(pipe, *key) - before[key], change, rtol=1e-4, atol=2e-5, msg=str(key))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", LAYERS)
def test_every_method_with_trained_text_encoders(family: str, name: str, tmp_path: Path) -> None:
    method, make = METHODS[name]
    want = written(family, make, tmp_path / "x.safetensors")
    known = format_of(read(tmp_path / "x"))
    assert known.name == ("onetrainer" if family != "sd" else "kohya" if name == "lora" else "lycoris")
    assert {layer.method for layer in known.layers(read(tmp_path / "x"))} == {method}
    assert_changes(family, tmp_path / "x", method, want)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "lokr"])
@pytest.mark.parametrize("family", ["flux", "sd"])
def test_dotted_paths_of_diffusers(family: str, name: str, tmp_path: Path) -> None:
    """`transformer.{path}.lora_down.weight` and the like, as in OneTrainer's backups and ai-toolkit's files."""
    method, make = METHODS[name]
    want = written(family, make, tmp_path / "x.safetensors", dotted=True)
    assert format_of(read(tmp_path / "x")).name == "onetrainer"
    assert_changes(family, tmp_path / "x", method, want)


def test_magnitudes_of_ai_toolkit(tmp_path: Path) -> None:
    """`magnitude` (d_out,) beside `lora_A` and `lora_B` in diffusers' layout, beside `lora_down` and `lora_up` in kohya's."""

    def ab(weight: Tensor) -> Made:
        parts, change = dora(weight, "magnitude")
        names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
        return {names.get(end, end): tensor for end, tensor in parts.items()}, change

    want = written("flux", ab, tmp_path / "x.safetensors", dotted=True)
    assert format_of(read(tmp_path / "x")).name == "diffusers"
    assert {block.method for block in inspect(tmp_path / "x").blocks} == {"dora"}
    assert_changes("flux", tmp_path / "x", "dora", want)
    want = written("sd", lambda weight: dora(weight, "magnitude"), tmp_path / "y.safetensors")
    assert format_of(read(tmp_path / "y")).name == "lycoris"
    assert_changes("sd", tmp_path / "y", "dora", want)


# ComfyUI's name, and the weights that its rows are
COMFY = {
    "flux": {
        "diffusion_model.double_blocks.0.img_attn.qkv": [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "diffusion_model.single_blocks.0.linear1": [
            f"transformer.single_transformer_blocks.0.{x}" for x in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ],
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": ["text_encoder.encoder.layers.0.mlp.fc1"],
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k": [
            "text_encoder_2.encoder.block.0.layer.0.SelfAttention.k"
        ],
    },
    "sd": {
        "diffusion_model.input_blocks.1.0.in_layers.2": ["unet.down_blocks.0.resnets.0.conv1"],
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": ["text_encoder.encoder.layers.0.mlp.fc1"],
    },
}
DIFFUSERS = {name: [name] for name in COMFY["flux"]["diffusion_model.single_blocks.0.linear1"]}


def with_ab(make: Callable[[Tensor], Made]) -> Callable[[Tensor], Made]:
    """`lora_A` and `lora_B`, as OneTrainer calls them for ComfyUI and diffusers."""

    def made(weight: Tensor) -> Made:
        parts, change = make(weight)
        names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
        return {names.get(end, end): tensor for end, tensor in parts.items()}, change

    return made


def peft_dora(weight: Tensor) -> Made:
    """`lora_magnitude_vector.weight` (d_out,), and s in `lora_B`."""
    parts, change = with_ab(lambda w: dora(w, "magnitude"))(weight)
    return {"lora_magnitude_vector.weight" if end == "magnitude" else end: tensor for end, tensor in parts.items()}, change


def assert_fused_changes(
    family: str, path: Path, make: Callable[[Tensor], Made], names: dict[str, list[str]], words: int, method: str
) -> str:
    """Write the change of every place in `names`, load it and compare each weight. The name of the file's format."""
    torch.manual_seed(0)
    pipe, state, want = tiny_pipeline(family), {}, {}
    for name, places in names.items():
        weights = [weight_of(pipe, *place.split(".", 1)) for place in places]
        parts, change = make(torch.cat(weights))
        state |= {f"{name}.{end}": tensor.contiguous() for end, tensor in parts.items()}
        want |= dict(zip(places, zip(weights, change.split([len(w) for w in weights]), strict=True), strict=True))
    width = pipe.text_encoder.config.hidden_size
    save_file(state | {f"bundle_emb.<{i}>.clip_l": torch.ones(1, width) for i in range(words)}, path)
    loaded = load_all(pipe, path)
    assert [a.method.name for a in loaded] == ["textual_inversion"] * words + [method]
    assert {block.method for block in inspect(path).blocks} == {a.method.name for a in loaded}
    loaded[-1].merge()
    for place, (before, change) in want.items():
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(weight_of(pipe, *place.split(".", 1)) - before, change, rtol=1e-4, atol=2e-5, msg=place)
    return format_of(read(path)).name


@pytest.mark.parametrize("words", [0, 1])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", COMFY)
def test_names_of_comfyui(family: str, name: str, words: int, tmp_path: Path) -> None:
    """`lora_A`, `lora_B`, `alpha` and `dora_scale` under ComfyUI's names, fused projections whole, with and without tokens."""
    if name == "lokr" and family == "flux":
        pytest.skip("a Kronecker product of a fused projection is in test_lycoris_fused.py")
    method, make = METHODS[name]
    form = assert_fused_changes(family, tmp_path / "x.safetensors", with_ab(make), COMFY[family], words, method)
    assert form == ("onetrainer" if words else "comfyui" if method == "lora" else "lycoris")


@pytest.mark.parametrize("name", ["lora", "dora of inputs", "dora", "loha"])
def test_paths_of_diffusers_beside_tokens(name: str, tmp_path: Path) -> None:
    method, make = METHODS[name]
    make = peft_dora if name == "dora" else with_ab(make)
    assert assert_fused_changes("flux", tmp_path / "x.safetensors", make, DIFFUSERS, 1, method) == "onetrainer"


def test_what_is_left_out_of_a_file_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written("flux", loha, tmp_path / "x.safetensors")
    pipe = tiny_pipeline("flux")
    with pytest.raises(LoadError) as caught:
        veneer.load(pipe.transformer, tmp_path / "x")
    assert len(caught.value.unused) == 10
    assert all(key.startswith("lora_te") for key in caught.value.unused), caught.value.unused
    with caplog.at_level(logging.WARNING, "veneer"):
        veneer.load(pipe, tmp_path / "x", strict=False).detach()
        assert caplog.messages == []
        loaded = veneer.load(pipe.transformer, tmp_path / "x", strict=False)
    assert len(loaded.loaded.unused) == 10
    assert any("10 tensors unused" in message and "lora_te1" in message for message in caplog.messages)


def test_oft_that_does_not_fit(tmp_path: Path) -> None:
    name = f"lora_transformer_{ATTENTION.replace('.', '_')}.oft_R.weight"
    for shape in ((8, 7), (7, 6), (8,)):
        save_file({name: torch.ones(shape)}, tmp_path / "x.safetensors")
        with raises(LoadError, where=name.partition(".")[0], given={"oft_R.weight": shape}):
            veneer.load(tiny_pipeline("flux"), tmp_path / "x")


def test_layers_of_dotted_names(tmp_path: Path) -> None:
    written("flux", lora, tmp_path / "x.safetensors", dotted=True)
    layers = onetrainer.OneTrainer().layers(read(tmp_path / "x"))
    assert [(layer.method, layer.rank, layer.alpha) for layer in layers] == [("lora", 3, 2.0)] * 4
