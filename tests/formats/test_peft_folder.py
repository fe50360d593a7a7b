"""peft's folders: a folder saved by peft has its weight updates, and peft reads saved folders."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.formats.cases import fill
from tests.raising import raises
from veneer.formats import format_of, inspect, peft_folder, read
from veneer.injection import LoadError, SaveError, attach, hosts
from veneer.testing.pipelines import tiny_pipeline

TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-6}


def vit() -> nn.Module:
    """timm's ViT, whose fused qkv is one module for peft."""
    return hosts.get("timm_vit")().tiny()["vit"]()


def clip() -> nn.Module:
    return hosts.get("clip_text")().tiny()["clip"]()


def unet() -> nn.Module:
    return tiny_pipeline("sd").unet


def changed(base: nn.Module, after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Changes of parameters, without zeros."""
    before = base.state_dict()
    return {name: after[name].double() - t.double() for name, t in before.items() if not torch.equal(after[name], t)}


def by_peft(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).merge_and_unload()
    return changed(base, merged.state_dict())


def by_veneer(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    model = copy.deepcopy(base)
    tuned = veneer.load(model, folder)
    tuned.merge()
    return changed(base, dict(tuned.host_state_dict()))


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert got
    for name, delta in want.items():
        assert delta.abs().max() > 1e-4, name
        torch.testing.assert_close(got[name], delta, **TOLERANCE, msg=lambda m, name=name: f"{name}: {m}")


def saved(base: nn.Module, config: peft.PeftConfig, folder: Path, std: float = 0.1) -> None:
    """A folder that peft itself has written, with values as after training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base), config)
        torch.manual_seed(7)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * std) if "magnitude" in name or "ia3" in name else p.normal_(std=std)
        model.save_pretrained(folder)


VIT, MLP = ["attn.qkv", "attn.proj"], ["mlp.fc1", "mlp.fc2"]
WRITTEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], peft.PeftConfig]]] = {
    "lora": (vit, lambda: peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=[*VIT, *MLP], rank_pattern={"fc1": 2},
        alpha_pattern={"^blocks.0.attn.qkv": 3, "proj": 9},
    )),
    "rslora": (vit, lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=VIT, use_rslora=True, rank_pattern={"proj": 2})),
    "alpha 0": (vit, lambda: peft.LoraConfig(r=4, lora_alpha=6, alpha_pattern={"attn.proj": 0}, target_modules=VIT)),
    "convolutions": (unet, lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["conv1", "to_q", "proj_in", "conv_in"])),
    "embedding": (clip, lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["token_embedding", "q_proj"])),
    "dora": (vit, lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=VIT, use_dora=True, rank_pattern={"proj": 2})),
    "dora of convolutions": (unet, lambda: peft.LoraConfig(r=2, lora_alpha=3, target_modules=["conv1", "to_q"], use_dora=True)),
    "loha": (vit, lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=VIT, rank_pattern={"proj": 2}, alpha_pattern={"proj": 1})),
    "loha of convolutions": (unet, lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["conv1", "to_q", "proj_in"])),
    "loha, cores": (unet, lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=["conv1", "to_q"], use_effective_conv2d=True)),
    "lokr": (vit, lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=[*VIT, *MLP], rank_pattern={"fc2": 1})),
    "lokr, full": (vit, lambda: peft.LoKrConfig(r=64, alpha=16, target_modules=VIT, decompose_factor=4)),
    "lokr, both": (vit, lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=VIT, decompose_both=True)),
    "lokr of convolutions": (unet, lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=["conv1", "to_q", "proj_in"])),
    "lokr, cores": (unet, lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=["conv1"], use_effective_conv2d=True)),
    "oft, default": (vit, lambda: peft.OFTConfig(target_modules=VIT)),
    "oft, series of 3": (vit, lambda: peft.OFTConfig(
        r=2, oft_block_size=0, target_modules=MLP, num_cayley_neumann_terms=3, block_share=True)),
    "coft, series": (vit, lambda: peft.OFTConfig(oft_block_size=4, target_modules=VIT, coft=True, eps=0.1)),
    "oft": (vit, lambda: peft.OFTConfig(oft_block_size=4, target_modules=VIT, use_cayley_neumann=False)),
    "oft, shared": (vit, lambda: peft.OFTConfig(
        oft_block_size=4, target_modules=VIT, use_cayley_neumann=False, block_share=True)),
    "oft, blocks": (vit, lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=MLP, use_cayley_neumann=False)),
    "coft": (vit, lambda: peft.OFTConfig(oft_block_size=4, target_modules=VIT, use_cayley_neumann=False, coft=True, eps=0.1)),
    "adalora": (vit, lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=9, target_modules=VIT)),
    "adalora, alpha 0": (vit, lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=0, total_step=9, target_modules=MLP)),
    "boft": (vit, lambda: peft.BOFTConfig(boft_block_size=4, target_modules=VIT, boft_n_butterfly_factor=1)),
    "ia3": (unet, lambda: peft.IA3Config(target_modules=["to_k", "to_v", "ff.net.2"], feedforward_modules=["ff.net.2"])),
    "vera": (vit, lambda: peft.VeraConfig(r=5, target_modules=[*VIT, *MLP])),
    "glora": (vit, lambda: peft.GloraConfig(r=2, target_modules=VIT, config_A_B="lora", config_C="none", config_D_E="vector")),
    "glora, others": (vit, lambda: peft.GloraConfig(
        r=2, target_modules=MLP, config_A_B="vector", config_C="none", config_D_E="constant")),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_what_peft_has_written_changes_the_weights_as_in_peft(tmp_path: Path, case: str) -> None:
    make, config = WRITTEN[case]
    base = make()
    saved(base, config(), tmp_path / "tuned")
    assert format_of(read(tmp_path / "tuned")).name == "peft_folder"
    assert_same(by_veneer(base, tmp_path / "tuned"), by_peft(base, tmp_path / "tuned"))


METHODS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "lora": (vit, "lora", {
        "where": ["attn.qkv", "attn.out", "mlp"], "rank": 3, "alpha": 2.0, "by_site": {"mlp.in": {"rank": 2}}, "rslora": True}),
    "convolutions": (unet, "lora", {"where": ["conv", "attn.q", "proj"], "rank": 3, "by_site": {"attn.q": {"alpha": 5.0}}}),
    "embedding": (clip, "lora", {"where": ["embed.token", "attn.q"], "rank": 3}),
    "pissa": (vit, "lora", {"where": ["attn.out"], "rank": 2, "init": "pissa"}),
    "tucker": (unet, "lora", {"where": ["conv.res"], "rank": 2, "tucker": True}),
    "dora": (vit, "dora", {"where": ["attn.qkv", "mlp"], "rank": 3, "alpha": 2.0}),
    "loha": (unet, "loha", {"where": ["attn.q", "proj"], "rank": 3, "alpha": 2.0}),
    "loha of convolutions": (unet, "loha", {"where": ["conv.res", "proj"], "rank": 3}),
    "loha, cores": (unet, "loha", {"where": ["conv.res", "attn.q"], "rank": 2, "tucker": True}),
    "lokr": (vit, "lokr", {"where": ["attn.qkv", "mlp"], "factor": 4, "rank": 2, "alpha": 3.0}),
    "lokr, full": (unet, "lokr", {"where": ["attn.q", "conv.res"], "factor": -1}),
    "oft": (vit, "oft", {"where": ["attn.qkv", "attn.out"], "block_size": 4}),
    "oft, series": (vit, "oft", {"where": ["attn.qkv", "attn.out"], "block_size": 4, "neumann_terms": 7}),
    "coft": (vit, "oft", {"where": ["attn.out"], "block_size": 4, "share": True, "coft": 0.002}),
    "boft": (vit, "boft", {"where": ["attn.out"], "m": 1, "b": 4, "rescale": True}),
    "ia3": (unet, "ia3", {}),
    "vera": (vit, "vera", {"where": ["attn.qkv", "mlp"], "rank": 6}),
    "glora": (vit, "glora", {"where": ["attn.out", "mlp", "bias.attn.out", "bias.mlp"], "rank": 2}),
    "glora of weights": (vit, "glora", {"where": ["attn.qkv"], "A": "vector", "B": "vector"}),
}  # fmt: skip


@pytest.mark.parametrize("case", METHODS)
def test_peft_makes_the_same_change_of_what_is_written(tmp_path: Path, case: str) -> None:
    make, method, options = METHODS[case]
    base = make()
    model = copy.deepcopy(base)
    tuned = fill(attach(model, method, **options), std=0.3)
    peft_folder.save(tuned, tmp_path / "tuned")
    tuned.merge()
    want = changed(base, dict(tuned.host_state_dict()))
    assert_same(by_peft(base, tmp_path / "tuned"), want)
    assert_same(by_veneer(base, tmp_path / "tuned"), want)


def test_pruned_adalora_keeps_the_scale_of_its_initial_rank(tmp_path: Path) -> None:
    base, folder = vit(), tmp_path / "x"
    saved(base, peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=9, target_modules=["attn.proj"]), folder)
    whole = by_peft(base, folder)
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    lowest = next(iter(state)).rpartition(".")[0]
    kept = {
        "lora_A": state[f"{lowest}.lora_A"][:2],
        "lora_B": state[f"{lowest}.lora_B"][:, :2],
        "lora_E": state[f"{lowest}.lora_E"][:2],
    }
    save_file(state | {f"{lowest}.{end}": t.contiguous() for end, t in kept.items()}, path)
    got = by_veneer(base, folder)
    name = f"{lowest.removeprefix('base_model.model.')}.weight"
    want = 6 / (4 + 1e-5) * (kept["lora_B"].double() @ (kept["lora_A"] * kept["lora_E"]).double())
    torch.testing.assert_close(got.pop(name), want, **TOLERANCE)
    whole.pop(name)
    assert_same(got, whole)
    (block,) = {(b.method, b.ranks) for b in inspect(folder).blocks if b.name in lowest}
    assert block == ("lora", (2,))


def test_the_folder_is_peft_s(tmp_path: Path) -> None:
    tuned = fill(attach(tiny_pipeline("flux"), "lora", where=["attn.q", "single"], rank=2))
    path = peft_folder.save(tuned, tmp_path / "x.safetensors")
    assert path == tmp_path / "x" / "adapter_model.safetensors"
    assert sorted(p.name for p in path.parent.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2.0)
    assert all(key.startswith("base_model.model.") and ".lora_" in key for key in load_file(path))
    loaded = veneer.load(tiny_pipeline("flux"), tmp_path / "x")
    assert loaded.parts.keys() == tuned.parts.keys()


def test_a_folder_for_a_text_encoder_finds_it_in_the_pipeline(tmp_path: Path) -> None:
    saved(tiny_pipeline("sd").text_encoder, peft.LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "x")
    assert {site.component for site, _ in veneer.load(tiny_pipeline("sd"), tmp_path / "x").parts.values()} == {"text_encoder"}


def test_modules_to_save_become_trained_parameters(tmp_path: Path) -> None:
    base = hosts.get("timm_vit")().tiny()["vit"]()
    saved(base, peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["head"]), tmp_path / "x")
    model = copy.deepcopy(base)
    loaded = veneer.load(model, tmp_path / "x")
    want = load_file(tmp_path / "x" / "adapter_model.safetensors")["base_model.model.head.weight"]
    assert torch.equal(model.head.weight, want)
    loaded.detach()
    assert torch.equal(model.head.weight, base.head.weight)


def test_a_converted_pissa_is_read_and_one_that_is_not_is_rejected(tmp_path: Path) -> None:
    base = vit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["attn.proj"], init_lora_weights="pissa")
        model = peft.get_peft_model(copy.deepcopy(base), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = "pissa"
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data += 0.1 * torch.randn_like(p)
        model.save_pretrained(tmp_path / "plain")
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        after = changed(base, model.merge_and_unload().state_dict())
    with raises(LoadError, option="init_lora_weights", given="pissa"):
        veneer.load(vit(), tmp_path / "plain")
    got = by_veneer(base, tmp_path / "converted")
    assert got.keys() == {name for name in after if "attn.proj" in name}
    for name in got:
        torch.testing.assert_close(got[name], after[name], rtol=1e-3, atol=1e-5)


def test_the_default_oft_of_peft_gives_its_outputs_and_is_written_back_bit_for_bit(tmp_path: Path) -> None:
    base, image = vit(), torch.randn(2, 3, 32, 32)
    saved(base, peft.OFTConfig(target_modules=VIT), tmp_path / "tuned", std=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "tuned"))
    model = copy.deepcopy(base)
    tuned = veneer.load(model, tmp_path / "tuned")
    with torch.no_grad():
        want, plain = theirs(image), base(image)
        got = model(image)
    assert (want - plain).abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    peft_folder.save(tuned, tmp_path / "again")
    before, after = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("tuned", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    one, two = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("tuned", "again"))
    kept = ("use_cayley_neumann", "num_cayley_neumann_terms", "coft", "block_share")
    assert one["use_cayley_neumann"]
    assert {k: one[k] for k in kept} == {k: two[k] for k in kept}


@pytest.mark.parametrize("terms", [0, 10**9, 2.5, "many"])
def test_a_series_of_an_impossible_number_of_terms(tmp_path: Path, terms: Any) -> None:
    saved(vit(), peft.OFTConfig(target_modules=VIT), tmp_path / "x")
    path = tmp_path / "x" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_cayley_neumann_terms": terms}))
    with raises(LoadError, option="num_cayley_neumann_terms"):
        veneer.load(vit(), tmp_path / "x")


# what is refused


@pytest.mark.parametrize(
    ("config", "data"),
    [
        ({"bias": "all"}, {"given": "all"}),
        ({"lora_bias": True}, {"given": True}),
        ({"layer_replication": [[0, 1]]}, {"given": [[0, 1]]}),
        ({"init_lora_weights": "olora"}, {"given": "olora"}),
        ({"init_lora_weights": "pissa_niter_4"}, {"given": "pissa_niter_4"}),
        ({"peft_type": "XLORA"}, {"given": "XLORA"}),
        ({"peft_type": None}, {"given": None}),
        ({"lora_alpha": "much"}, {"where": "blocks.0.attn.qkv", "given": "much"}),
        ({"alpha_pattern": {"(": 3}}, {"where": None}),
        ({"alpha_pattern": {"(.*a)*b": 3}}, {"where": None}),
    ],
    ids=lambda v: next(iter(v)),
)
def test_what_the_tensors_do_not_hold_is_rejected(tmp_path: Path, config: dict[str, Any], data: dict[str, Any]) -> None:
    saved(vit(), peft.LoraConfig(r=2, target_modules=["qkv"]), tmp_path / "x")
    path = tmp_path / "x" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    model = vit()
    with raises(LoadError, option=next(iter(config)), **data):
        veneer.load(model, tmp_path / "x")
    assert veneer.attachments(model) == []


NOT_JSON = {"expected": "JSON"}


@pytest.mark.parametrize(("text", "data"), [("{", NOT_JSON), ("[]", {"option": "peft_type"}), ("[" * 10**5, NOT_JSON)])
def test_a_damaged_config(tmp_path: Path, text: str, data: dict[str, Any]) -> None:
    saved(vit(), peft.LoraConfig(r=2, target_modules=["qkv"]), tmp_path / "x")
    (tmp_path / "x" / "adapter_config.json").write_text(text)
    with raises(LoadError, file=str(tmp_path / "x" / "adapter_config.json"), **data):
        veneer.load(vit(), tmp_path / "x")


def test_other_terms_of_other_methods(tmp_path: Path) -> None:
    saved(vit(), peft.GloraConfig(r=2, target_modules=["qkv"], config_C="vector"), tmp_path / "c")
    with raises(LoadError, where="blocks.0.attn.qkv", given="C"):
        veneer.load(vit(), tmp_path / "c")
    saved(vit(), peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]), tmp_path / "ia3")
    with raises(LoadError, where="blocks.0.attn.qkv", given="bias"):
        veneer.load(vit(), tmp_path / "ia3")
    with pytest.warns(UserWarning, match="to not save vera_A"):
        config = peft.VeraConfig(r=2, target_modules=["qkv"], save_projection=False)
    saved(vit(), config, tmp_path / "vera")
    with raises(LoadError, option="save_projection", missing=("base_model.vera_A", "base_model.vera_B")):
        veneer.load(vit(), tmp_path / "vera")
    saved(unet(), peft.OFTConfig(oft_block_size=4, target_modules=["conv1"], use_cayley_neumann=False), tmp_path / "conv")
    with raises(LoadError, given=(3, 3)):
        veneer.load(unet(), tmp_path / "conv")


def test_another_model_and_an_incomplete_file(tmp_path: Path) -> None:
    saved(vit(), peft.LoraConfig(r=2, target_modules=["qkv"]), tmp_path / "x")
    path = tmp_path / "x" / "adapter_model.safetensors"
    state = load_file(path)
    with pytest.raises(LoadError) as caught:
        veneer.load(clip(), tmp_path / "x")
    assert sorted(caught.value.unused) == sorted(state)
    key = next(k for k in state if "lora_B" in k)
    save_file({k: t for k, t in state.items() if k != key}, path)
    with raises(LoadError, missing=("blocks.0.attn.qkv:up",)):
        veneer.load(vit(), tmp_path / "x")


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: attach(vit(), "lora", where="attn.q"), {"expected": "blocks.0.attn.qkv"}),
        (lambda: attach(vit(), "bitfit"), {"where": "bitfit", "given": "bitfit"}),
        (lambda: attach(vit(), "lora", where="attn.qkv", train="head"), {"where": "lora", "given": ("head:weight", "head:bias")}),
        (
            lambda: attach(tiny_pipeline("sd"), "lora", where=["attn.q", "text/attn.q"]),
            {"where": "lora", "given": ("unet", "text_encoder"), "expected": 1},
        ),
        (lambda: attach(vit(), "dora", where="attn.out", norm_axis="input"), {"given": {"norm_axis": "input"}}),
        (lambda: attach(vit(), "loha", where="attn.out", norm_axis="output"), {"given": {"norm_axis": "output"}}),
        (lambda: attach(vit(), "lokr", where="attn.out", norm_axis="input"), {"given": {"norm_axis": "input"}}),
        (lambda: attach(vit(), "oft", where="attn.out", block_size=4, rescale=True), {"given": {"rescale": True}}),
        (
            lambda: attach(vit(), "oft", where="attn.out", block_size=4, side="output"),
            {"given": "output", "expected": "input"},
        ),
        (lambda: attach(vit(), "ia3", where="attn.qkv"), {"where": "blocks.0.attn.qkv", "given": "bias"}),
        (lambda: attach(vit(), "glora", where="bias.mlp"), {"expected": "weight"}),
        (lambda: attach(vit(), "glora", where=["mlp", "bias.mlp.in"]), {"given": None, "expected": "bias"}),
        (lambda: attach(vit(), "glora", where="bias.attn.q"), {"expected": "blocks.0.attn.qkv"}),
        (
            lambda: attach(vit(), "glora", where="attn.qkv", A="none"),
            {"where": "blocks.0.attn.qkv", "given": (("none", "low_rank"), ("none", "none"))},
        ),
        (lambda: attach(unet(), "oft", where="conv.res", block_size=4), {"given": (3, 3)}),
        (lambda: [], {"given": 0, "expected": 1}),
    ],
)
def test_what_peft_does_otherwise_is_not_written(tmp_path: Path, make: Callable[[], Any], data: dict[str, Any]) -> None:
    with raises(SaveError, **data):
        peft_folder.save(make(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
