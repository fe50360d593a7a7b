"""LyCORIS' layout: its own modules and veneer agree about the change of every weight, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from veneer.formats import load_all, lycoris
from veneer.testing.pipelines import tiny_pipeline

from .lycoris_cases import SITES, assert_same, by_site, change, changes, chosen, made, read, write

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {  # to LyCORIS' algorithm, veneer's method and LyCORIS' options
    "locon": ("locon", "lora", {"lora_dim": 3, "alpha": 2.0}),
    "locon-tucker": ("locon", "lora", {"lora_dim": 3, "alpha": 2.0, "use_tucker": True}),
    "dora": ("locon", "dora", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True}),
    "loha": ("loha", "loha", {"lora_dim": 3, "alpha": 2.0}),
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
UNSPLIT = {*(case for case in CASES if case.startswith("lokr")), "boft"}  # of which FLUX's fused projections are no whole blocks


def sites_of(family: str, case: str) -> list[str]:
    if family == "flux" and case in UNSPLIT:
        return [s for s in SITES[family] if s.endswith("x_embedder")]
    return SITES[family]


@pytest.mark.parametrize("family", list(SITES))
@pytest.mark.parametrize("case", list(CASES))
def test_both_ways(tmp_path: Path, family: str, case: str) -> None:
    """LyCORIS' file makes its change here; what is written of it makes the same change in LyCORIS, and here again."""
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
