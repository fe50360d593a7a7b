"""LyCORIS' layout: its own modules and veneer have equal weight updates, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lycoris import create_lycoris, create_lycoris_from_weights
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.cases import fill, header
from tests.formats.lycoris_cases import SITES, assert_same, by_site, change, changes, chosen, made, read, write
from veneer.formats import load_all, lycoris
from veneer.injection import attach
from veneer.testing.pipelines import tiny_pipeline

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # to LyCORIS' algorithm, veneer's method and LyCORIS' options
    "locon": ("locon", "lora", {"lora_dim": 3, "alpha": 2.0}),
    "locon-tucker": ("locon", "lora", {"lora_dim": 3, "alpha": 2.0, "use_tucker": True}),
    "dora": ("locon", "dora", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True}),
    "dora-input": ("locon", "dora", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True, "wd_on_out": False}),
    "loha": ("loha", "loha", {"lora_dim": 3, "alpha": 2.0}),
    "loha-dora": ("loha", "loha", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True}),
    "loha-dora-input": ("loha", "loha", {"lora_dim": 2, "use_tucker": True, "weight_decompose": True, "wd_on_out": False}),
    "lokr-dora": ("lokr", "lokr", {"lora_dim": 1, "alpha": 0.5, "weight_decompose": True}),
    "lokr-dora-input": ("lokr", "lokr", {"lora_dim": 9, "full_matrix": True, "weight_decompose": True, "wd_on_out": False}),
    "loha-tucker": ("loha", "loha", {"lora_dim": 2, "alpha": 3.0, "use_tucker": True, "rs_lora": True}),
    "lokr": ("lokr", "lokr", {"lora_dim": 1, "alpha": 0.5}),
    "lokr-both": ("lokr", "lokr", {"lora_dim": 1, "alpha": 3.0, "decompose_both": True}),
    "lokr-full": ("lokr", "lokr", {"lora_dim": 9, "alpha": 2.0, "factor": 4, "full_matrix": True}),
    "lokr-tucker": ("lokr", "lokr", {"lora_dim": 1, "alpha": 0.5, "use_tucker": True, "factor": 2}),
    "lokr-unbalanced": ("lokr", "lokr", {"lora_dim": 2, "alpha": 1.0, "factor": 8, "unbalanced_factorization": True}),
    "oft": ("diag-oft", "oft", {"lora_dim": 4}),
    "oft-constraint": ("diag-oft", "oft", {"lora_dim": 4, "constraint": 0.01, "rescaled": True}),
    "boft": ("boft", "boft", {"lora_dim": 14, "rescaled": True}),
    "glora": ("glora", "glora", {"lora_dim": 3, "alpha": 2.0}),
    "ia3": ("ia3", "ia3", {}),
    "ia3-input": ("ia3", "ia3", {"train_on_input": True}),
}
UNSPLIT = {"boft"}  # of which FLUX's fused projections are no whole blocks


def sites_of(family: str, case: str) -> list[str]:
    if family == "flux" and case in UNSPLIT:
        return [s for s in SITES[family] if s.endswith("x_embedder")]
    return SITES[family]


@pytest.mark.parametrize(
    ("family", "case"),
    [
        (family, case)
        for family in SITES
        for case in CASES
        if family != "sdxl" or case in ("dora", "dora-input", "loha-tucker", "boft")
    ],
)
def test_both_ways(tmp_path: Path, family: str, case: str) -> None:
    """LyCORIS' file has its weight updates here; the file saved of it has the same in LyCORIS, and here again."""
    algo, method, options = CASES[case]
    pipe = tiny_pipeline(family)
    places = chosen(pipe, sites_of(family, case))
    modules = [made(pipe, place, algo, **options) for place in places]
    want = {
        name: delta
        for place, module in zip(places, modules, strict=True)
        for name, delta in by_site(place, change(module)).items()
    }
    assert min(delta.abs().max() for delta in want.values()) > 1e-3
    loaded = load_all(pipe, write(tmp_path / "theirs.safetensors", modules))
    assert [a.method.name for a in loaded] == [method]
    assert_same(changes(loaded), want)
    path = lycoris.save(loaded, tmp_path / "ours")
    if case != "lokr-unbalanced":  # whose split LyCORIS itself does not find again
        assert_same(read(tiny_pipeline(family), path), want)
    again = load_all(tiny_pipeline(family), path)
    assert_same(changes(again), want)
    assert all(a.loaded.clean for a in again)


def fill_all(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def test_one_file_of_several_methods(tmp_path: Path) -> None:
    """Each method is an attachment, with its ranks, alphas and splits by site; all of them are saved in one file again."""
    pipe = tiny_pipeline("sd")
    places = chosen(pipe, SITES["sd"])
    how: list[tuple[str, dict[str, Any]]] = [
        ("locon", {"lora_dim": 3}),
        ("locon", {"lora_dim": 2, "weight_decompose": True}),
        ("lokr", {"factor": 2, "full_matrix": True}),
        ("lokr", {"lora_dim": 1, "alpha": 2.0}),
        ("loha", {"lora_dim": 2, "alpha": 2.0}),
    ]
    modules = [made(pipe, place, algo, **options) for place, (algo, options) in zip(places, how, strict=True)]
    want = {n: d for place, module in zip(places, modules, strict=True) for n, d in by_site(place, change(module)).items()}
    loaded = load_all(pipe, write(tmp_path / "x.safetensors", modules))
    assert sorted(a.method.name for a in loaded) == ["dora", "loha", "lokr", "lora"]
    assert {a.name for a in loaded} == {"dora", "loha", "lokr", "lora"}
    assert_same(changes(loaded), want)
    path = lycoris.save(loaded, tmp_path / "again")
    assert_same(read(tiny_pipeline("sd"), path), want)
    assert_same(changes(load_all(tiny_pipeline("sd"), path)), want)


def test_layers_of_one_method_that_differ(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    places = chosen(pipe, SITES["sd"])
    modules = [made(pipe, place, "loha", lora_dim=rank, alpha=rank / 2) for rank, place in enumerate(places, 1)]
    want = {n: d for place, module in zip(places, modules, strict=True) for n, d in by_site(place, change(module)).items()}
    (loaded,) = load_all(pipe, write(tmp_path / "x.safetensors", modules))
    assert len(loaded.method.by_site) == len(places) - 1
    assert_same(changes(loaded), want)
    path = loaded.save(tmp_path / "native")
    (again,) = load_all(tiny_pipeline("sd"), path)
    assert_same(changes(again), want)
    assert again.method.config() == loaded.method.config()


@pytest.mark.parametrize("algo", ["lokr", "loha", "diag-oft"])
@pytest.mark.parametrize("make", ["timm", "unet"])
def test_files_of_lycoris_own_wrapper_for_any_model(tmp_path: Path, algo: str, make: str) -> None:
    """`lycoris_` and paths of the model itself, also of a fused projection; outputs agree, too."""

    def build() -> tuple[Any, Any]:
        if make == "unet":
            return tiny_pipeline("sd").unet, (torch.ones(1, 4, 8, 8), torch.tensor(3), torch.ones(1, 5, 24))
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=3, embed_dim=24, depth=1, num_heads=2, img_size=32)
        return model.eval(), (torch.ones(1, 3, 32, 32),)

    model, inputs = build()
    network = create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1.0, algo=algo, preset="full", warn_on_unmatched=False)
    network.apply_to()
    fill_all(network)
    save_file({k: t.detach().clone().contiguous() for k, t in network.state_dict().items()}, tmp_path / "x.safetensors")
    plain, _ = build()
    loaded = load_all(plain, tmp_path / "x")
    with torch.no_grad():
        want, got, bare = (tensor_of(m(*inputs)) for m in (model, plain, build()[0]))
    assert (want - bare).abs().max() > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if make == "timm":  # what is written for such a model has these names again
        fresh, _ = build()
        again, _ = create_lycoris_from_weights(1.0, str(lycoris.save(loaded, tmp_path / "again")), fresh)
        again.apply_to()
        with torch.no_grad():
            torch.testing.assert_close(tensor_of(fresh(*inputs)), want, rtol=1e-4, atol=1e-4)


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def test_outputs_are_as_before(tmp_path: Path) -> None:
    """Save and load of adapters trained here, in one file of several methods."""

    def run(pipe: Any) -> Tensor:
        with torch.no_grad():
            return pipe.unet(torch.ones(1, 4, 8, 8), torch.tensor(3), torch.ones(1, 5, 24)).sample

    pipe = tiny_pipeline("sd")
    bare = run(pipe)
    several = [
        fill(attach(pipe, "oft", where="attn.q", side="output", coft=0.05, share=True), std=0.2),
        fill(attach(pipe, "boft", where="attn.k", side="output", b=4), std=0.2),
        fill(attach(pipe, "dora", where="xattn", rank=2), std=0.2),
        fill(attach(pipe, "glora", where="mlp", A="none", rank=2), std=0.2),
        fill(attach(pipe, "lokr", where="conv.res", rank=1, factor=4), std=0.2),
    ]
    want, path = run(pipe), lycoris.save(several, tmp_path / "x")
    fresh = tiny_pipeline("sd")
    loaded = load_all(fresh, path)
    assert (want - bare).abs().max() > 1e-2
    torch.testing.assert_close(run(fresh), want, rtol=1e-4, atol=1e-5)
    assert_same(changes(loaded), changes(several))


def test_what_other_tools_look_for_in_the_header(tmp_path: Path) -> None:
    loha = fill(attach(tiny_pipeline("sdxl"), "loha", where="attn", rank=3, alpha=2.0))
    found = header(lycoris.save(loha, tmp_path / "x", {"base": "toy"}))["__metadata__"]
    assert {key: value for key, value in found.items() if not key.startswith(("modelspec.", "sshs_"))} == {
        "format": "pt",
        "ss_sd_model_name": "toy",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "3",
        "ss_network_alpha": "2.0",
        "ss_network_args": '{"algo": "loha"}',
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "provenance": '{"base": "toy"}',
    }


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("boft", {"m": 1, "b": 2}),
        ("boft", {"m": 2, "b": 4}),
        ("boft", {"m": 3, "b": 2, "rescale": True}),
        ("oft", {"block_size": 4}),
        ("oft", {"block_size": 2, "rescale": True}),
        ("oft", {"block_size": 4, "coft": 1e-3, "share": True}),
    ],
)
def test_lycoris_itself_loads_trained_rotations(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """A butterfly of fewer components than LyCORIS builds is padded with zeros, and has its original number when it is read."""
    pipe = tiny_pipeline("sd")
    tuned = fill(attach(pipe, method, where=["attn.{q,k}", "conv.res"], side="output", **options), std=0.2)
    want, path = changes(tuned), lycoris.save(tuned, tmp_path / "x")
    assert_same(read(tiny_pipeline("sd"), path), want)
    (again,) = load_all(tiny_pipeline("sd"), path)
    assert_same(changes(again), want)
    for name, (_, adapter) in tuned.parts.items():
        assert adapter.skew.shape[:-2] == again.parts[name][1].skew.shape[:-2]


def test_lycoris_itself_loads_only_blocks_of_a_side_up_to_their_number(tmp_path: Path) -> None:
    """Others are read by ComfyUI and A1111, and here."""
    tuned = fill(attach(tiny_pipeline("sd"), "oft", where="attn.q", side="output", block_size=16), std=0.2)
    path = lycoris.save(tuned, tmp_path / "x")
    with pytest.raises(RuntimeError):
        read(tiny_pipeline("sd"), path)
    assert_same(changes(load_all(tiny_pipeline("sd"), path)), changes(tuned))
