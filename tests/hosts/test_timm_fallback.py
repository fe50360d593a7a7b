"""The fallback host of timm: what it reads from one forward pass on the meta device, and training through `veneer transfer`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn
from veneer.pipelines.transfer import transfer

import veneer
from tests.classification.small import image_folder
from tests.hosts.timm_coverage import Coverage, coverage, page
from veneer.classification.config import TransferConfig
from veneer.hosts._timm_fallback.depths import depths
from veneer.hosts._timm_fallback.tiny import BUILDERS, UNCOMMON
from veneer.hosts.timm_fallback import TimmFallback
from veneer.injection.errors import UnsupportedSite
from veneer.injection.registry import host_of, hosts
from veneer.injection.sites import FeatureSite, ParamSite, PixelSite, Site, WeightSite


class Net(nn.Module):
    """Layers that are called, called twice, read, called and read, without hooks, and not at all; a norm and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 8, 8)}
        self.plain, self.twice, self.read, self.both, self.unused = (nn.Linear(8, 8) for _ in range(5))
        self.silent, self.norm = nn.Conv2d(3, 3, 1), nn.LayerNorm(8)
        self.scale, self.spare = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.again = nn.ModuleList([self.twice])

    def forward(self, x: Tensor) -> Tensor:
        x = self.again[0](self.twice(self.plain(self.silent.forward(x))))
        x = F.linear(x, self.read.weight, self.read.bias)
        return self.norm(self.both(x) + x @ self.both.weight) * self.scale


class Stubborn(Net):
    """Rejects every image."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no")


for _class in (Net, Stubborn):
    _class.__module__ = "timm.models.net"


def by_name(model: nn.Module) -> dict[str, Any]:
    return {site.name: site for site in TimmFallback().sites(model)}


def test_layers_are_called_read_or_unused_as_in_the_forward_pass() -> None:
    sites = by_name(Net())
    called = {name: site.called for name, site in sites.items() if isinstance(site, WeightSite)}
    assert called == {"plain": True, "twice": True, "read": False, "both": False, "unused": False, "silent": False}
    inert = {name for name, site in sites.items() if site.inert}
    assert inert == {"unused", "unused.bias", "spare"}
    assert sites["norm"].called
    assert isinstance(sites["scale"], ParamSite)
    assert "again.0" not in sites


def test_a_lora_on_each_layer_changes_the_output_as_its_merged_weight_does() -> None:
    model = Net().double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    names = ("plain", "twice", "read", "both", "silent")
    tuned = veneer.attach(model, "lora", where=[f"name:{name}" for name in names])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        outside = model(x)
        tuned.merge()
        torch.testing.assert_close(model(x), outside)


def test_a_model_that_cannot_run_on_meta_is_rejected() -> None:
    with pytest.raises(UnsupportedSite) as raised:
        by_name(Stubborn())
    assert (raised.value.host, raised.value.given) == ("timm_fallback", (3, 8, 8))


class NetHost(TimmFallback):
    """A host of one class."""

    name = "net"
    fallback = False

    def matches(self, model: nn.Module) -> bool:
        return isinstance(model, Net)


@pytest.fixture
def other_host() -> Iterator[None]:
    hosts.register(NetHost)
    yield
    hosts.unregister("net")


@pytest.mark.usefixtures("other_host")
def test_any_other_host_is_preferred() -> None:
    host = host_of(Net())
    assert host is not None
    assert host.name == "net"


def test_parts_of_models_and_feature_extractors_have_no_host() -> None:
    import timm

    model = UNCOMMON["mixer"]()
    assert host_of(model.get_submodule("blocks.0")) is None
    assert host_of(timm.create_model("test_byobnet", features_only=True)) is None


def test_sites_stay_the_same_with_adapters_and_in_copies() -> None:
    model = BUILDERS["nfnet"]()
    bare = list(TimmFallback().sites(model))
    veneer.attach(model, "lora", where="conv")
    assert list(TimmFallback().sites(model)) == bare
    assert list(TimmFallback().sites(copy.deepcopy(model))) == bare


def test_sites_leave_the_model_and_the_random_state_alone() -> None:
    model = UNCOMMON["levit"]().train()
    before = copy.deepcopy(model.state_dict())
    model.set_grad_checkpointing()
    state = torch.random.get_rng_state()
    list(TimmFallback().sites(model))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.grad_checkpointing
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_with_cached_tensors_has_the_same_sites() -> None:
    model = UNCOMMON["levit"]()
    bare = list(TimmFallback().sites(model))
    other = UNCOMMON["levit"]()
    other(**TimmFallback().sample(other))
    assert other.get_submodule("stages.0.blocks.0.attn").attention_bias_cache
    assert list(TimmFallback().sites(other)) == bare
    assert not [site.name for site in bare if site.name.endswith("attention_biases")]


def test_gradient_checkpointing_hides_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import xcit

    model = BUILDERS["xcit"]()
    bare = [(site.name, site.inert) for site in TimmFallback().sites(model)]
    monkeypatch.setattr(xcit, "checkpoint", partial(torch.utils.checkpoint.checkpoint, use_reentrant=True))
    switched = BUILDERS["xcit"]()
    switched.set_grad_checkpointing()
    assert [(site.name, site.inert) for site in TimmFallback().sites(switched)] == bare


def test_a_new_head_is_described_by_its_own_sizes() -> None:
    model: Any = BUILDERS["ghostnet"]()
    assert by_name(model)["classifier.logits"].classes == 10
    model.reset_classifier(3)
    sites = by_name(model)
    assert sites["classifier"].d_out == sites["classifier.logits"].classes == 3
    assert sites["classifier.features"].width == sites["classifier"].d_in


def test_a_convolution_as_the_head_offers_logits_at_the_output_of_the_model() -> None:
    found = [site for site in TimmFallback().sites(BUILDERS["resnetv2"]()) if isinstance(site, FeatureSite)]
    assert [(site.role, site.port.path, site.classes, site.read) for site in found] == [("logits", "", 10, None)]


def test_standardized_weights_are_read_and_their_gains_are_scales() -> None:
    sites = by_name(BUILDERS["nfnet"]())
    convolutions = [s for s in sites.values() if isinstance(s, WeightSite) and s.kind == "conv" and not s.role.startswith("se.")]
    assert convolutions
    assert not any(site.called for site in convolutions)
    assert sites["stem.conv1.gain"].role == "scale"


@pytest.mark.parametrize(
    ("key", "path", "role"),
    [
        ("cait", "blocks.0.attn.qkv", "attn.qkv"),
        ("cait", "blocks_token_only.0.attn.k", "attn.k"),
        ("cait", "blocks.0.mlp.fc2", "mlp.out"),
        ("cait", "patch_embed.proj", "conv.patch"),
        ("cait", "head", "head"),
        ("levit", "stages.0.blocks.0.attn.qkv.linear", "attn.qkv"),
        ("levit", "stages.1.downsample.attn_downsample.kv.linear", "attn.kv"),
        ("levit", "head_dist.linear", "head"),
        ("ghostnet", "conv_stem", "conv.stem"),
        ("nfnet", "stages.0.0.attn_last.fc1", "se.in"),
        ("mixer", "blocks.0.mlp_tokens.fc1", "mlp.in"),
        ("coatnet", "stages.1.blocks.0.attn.qkv", "attn.qkv"),
    ],
)
def test_roles_follow_the_names_around_a_layer(key: str, path: str, role: str) -> None:
    assert by_name({**BUILDERS, **UNCOMMON}[key]())[path].role == role


def test_depth_counts_the_blocks_and_leaves_out_stem_and_head() -> None:
    model = BUILDERS["xcit"]()
    found = depths(model, [name for name, _ in model.named_parameters()])
    assert {name.split(".")[1]: depth for name, depth in found.items() if name.startswith("blocks.")} == {"0": 0, "1": 1}
    assert found["cls_attn_blocks.0.attn.proj.weight"] == 2
    assert not {"cls_token", "head.weight", "patch_embed.proj.0.0.weight"} & set(found)


def test_stages_of_a_model_without_a_matcher_are_split_into_blocks() -> None:
    model = UNCOMMON["poolformer"]()
    found = depths(
        model, ["stem.conv.weight", "stages.0.blocks.0.norm1.weight", "stages.0.blocks.1.norm1.weight", "head.fc.weight"]
    )
    assert found == {"stages.0.blocks.0.norm1.weight": 0, "stages.0.blocks.1.norm1.weight": 1}


def test_coverage_lists_the_methods_with_default_sites_and_reasons() -> None:
    row = coverage("test_nfnet")
    assert (row.host, row.family) == ("timm_fallback", "nfnet.NormFreeNet")
    assert row.methods == ["lora", "bitfit", "linear_probe", "evp"]
    text = page([row, Coverage("none", reason="not built on meta: ValueError: 3")], 10)
    assert "| `timm_fallback` | 1 | 1 | 1 | 0 | 1 | 1 | 1 |" in text
    assert "| `norm_tuning`: no default site, nfnet.NormFreeNet | 1 (test_nfnet) |" in text
    assert "| not built on meta: ValueError: n | 1 (none) |" in text


RUNS = [
    ("test_byobnet", "lora+norm_tuning", WeightSite),
    ("test_byobnet", "evp", PixelSite),
    ("test_vit_relpos", "lora+bitfit", WeightSite),
    ("test_vit_relpos", "linear_probe", WeightSite),
]


@pytest.mark.parametrize(("model", "method", "kind"), RUNS, ids=[f"{m}-{method}" for m, method, _ in RUNS])
def test_transfer_trains(model: str, method: str, kind: type[Site], tmp_path: Path) -> None:
    pictures = image_folder(tmp_path / "pictures", count=6)
    shape: dict[str, Any] = {
        "size": 64,
        "epochs": 1,
        "batch": 6,
        "augment": "none",
        "workers": 0,
        "test": 0.25,
        "weights": "none",
    }
    out = transfer(TransferConfig(data=str(pictures), model=model, method=method, out=tmp_path / "run", **shape))
    tensors = load_file(out / "adapter.safetensors")
    assert any(site for site in veneer.sites(_timm(model)) if isinstance(site, kind))
    changed = [name for name, value in tensors.items() if value.is_floating_point() and value.abs().max() > 0]
    assert changed
    assert json.loads((out / "result.json").read_text())["test"]["confusion"]


def _timm(name: str) -> nn.Module:
    import timm

    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model
