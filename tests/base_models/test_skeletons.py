"""Modules from stored trees against those that diffusers and transformers build."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.raising import raises
from veneer import base_models
from veneer.base_models.architectures import library_architecture
from veneer.base_models.skeletons import meta_modules
from veneer.base_models.skeletons.recording import Recorder
from veneer.injection import UnknownName, VeneerError, attach
from veneer.injection.attachment.model_state import lookup
from veneer.injection.sites import Site
from veneer.injection.towers import towers_of


def networks(architecture: Any) -> dict[str, nn.Module]:
    return {part: module for part, module in architecture.components.items() if isinstance(module, nn.Module)}


def classes(module: nn.Module) -> list[tuple[str, str, str]]:
    return [(path, type(m).__module__, type(m).__qualname__) for path, m in module.named_modules()]


def tensors(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    both = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
    return {name: (tuple(t.shape), t.dtype, t.device, t.requires_grad) for name, t in both}


def fields(site: Site) -> dict[str, Any]:
    """All fields of a site; of the tokenizer only its presence is compared, of readers of text states their classes."""
    readers = getattr(site, "readers", None)
    others = {
        "tokenizer": getattr(site, "tokenizer", None) is None,
        "readers": readers and ([type(m).__name__ for m in (*readers.cross, *readers.others)], readers.widths),
    }
    return {k: others.get(k, v) for k, v in vars(site).items() if k != "encoder"} | {"kind": type(site)}


@pytest.mark.parametrize("name", base_models.ARCHITECTURES)
def test_an_architecture_has_the_modules_and_sites_of_the_libraries(name: str) -> None:
    """If this fails after an update of a library: python -m veneer.base_models.skeletons.recording."""
    ours, theirs = base_models.architecture(name), library_architecture(name)
    assert ours.components.keys() == theirs.components.keys()
    for part, module in networks(theirs).items():
        stored = networks(ours)[part]
        assert classes(stored) == classes(module)
        assert tensors(stored) == tensors(module)
        assert [m.training for m in stored.modules()] == [m.training for m in module.modules()]
        assert list(stored.state_dict()) == list(module.state_dict())
        assert len(list(stored.parameters())) == len(list(module.parameters()))  # tied ones count once
    pairs = zip(towers_of(ours), towers_of(theirs), strict=True)
    for tower, other in pairs:
        assert (tower.component, tower.host.name, tower.main) == (other.component, other.host.name, other.main)
        assert [fields(s) for s in tower.sites] == [fields(s) for s in other.sites]
        guards = {site.guard for site in tower.sites if site.guard}
        assert [lookup(tower.module, guard) for guard in guards] == [lookup(other.module, guard) for guard in guards]


@pytest.mark.parametrize(("part", "kind"), [("unet", nn.Conv2d), ("text_encoder", nn.Embedding)])
def test_layers_of_torch_are_complete(part: str, kind: type[nn.Module]) -> None:
    """Attributes, and for classes of torch also private ones, so that a layer runs on other tensors."""
    ours, theirs = (networks(a)[part] for a in (base_models.architecture("sd15"), library_architecture("sd15")))
    for stored, module in zip(ours.modules(), theirs.modules(), strict=True):
        if isinstance(module, kind):
            assert isinstance(stored, kind)
            skipped = {"_parameters", "_modules", "_buffers"}
            assert {k: v for k, v in vars(stored).items() if k not in skipped} == {
                k: v for k, v in vars(module).items() if k not in skipped
            }


def test_an_architecture_cannot_run() -> None:
    unet = networks(base_models.architecture("sd15"))["unet"]
    with pytest.raises(NotImplementedError):
        unet(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    with raises(UnknownName, name="sd99", kind="architecture"):
        library_architecture("sd99")


def test_earlier_versions_of_transformers_have_one_more_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_modules, "version", lambda name: "4.57.1")
    parts = networks(base_models.architecture("sdxl"))
    for part in ("text_encoder", "text_encoder_2"):
        names = list(parts[part].state_dict())
        assert "text_model.encoder.layers.0.mlp.fc1.weight" in names
        assert all(name.startswith(("text_model.", "text_projection.")) for name in names)
    sites = [s.name for tower in towers_of(base_models.architecture("sd15")) for s in tower.sites]
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1" in sites


def test_a_module_at_two_paths_is_rejected() -> None:
    shared = nn.Linear(2, 2)
    with pytest.raises(ValueError):
        Recorder().model(nn.ModuleDict({"a": shared, "b": shared}))


CODE = """
import sys
from veneer import base_models
from veneer.injection.towers import towers_of
sites = [s for name in ("sd15", "z-image") for tower in towers_of(base_models.architecture(name)) for s in tower.sites]
before = [m for m in ("diffusers", "transformers") if m in sys.modules]
print(len(sites) > 1000, before, "transformers" in sys.modules)
"""


def test_an_architecture_imports_neither_diffusers_nor_transformers() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "True [] False"


def test_tokens_are_added_to_the_deferred_tokenizer_and_removed_again() -> None:
    pytest.importorskip("open_clip", reason="needs open_clip's vocabulary")
    parts = base_models.architecture("sd15")
    tokenizer = parts.components["tokenizer"]
    size = len(tokenizer)
    attached = attach(parts, "textual_inversion", tokens="<toy>", vectors=2)
    assert len(tokenizer) == size + 2
    assert tokenizer("a <toy>").input_ids[2] == size
    with pytest.raises(VeneerError):
        attach(parts, "textual_inversion", tokens="<toy>")
    attached.detach()
    assert len(tokenizer) == size
