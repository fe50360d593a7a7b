"""A few architectures of every host through what tries all of them; and it reports errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

from tests.hosts import every_architecture
from tests.hosts.architectures_page import page, pattern
from tests.hosts.every_architecture import HUGGING, LIBRARIES, Outcome, knows_a_family, names, outcomes, run
from veneer.injection.method import Adapter, Method, Need
from veneer.injection.registry import methods
from veneer.injection.sites import WeightSite

EVERY = ["timm_fallback", *(host for hosts in LIBRARIES.values() for host in hosts)]
SAMPLE = {
    "timm/vit_tiny_patch16_224": ["timm_vit"],
    "timm/eva02_tiny_patch14_224": ["timm_vit"],
    "timm/swin_tiny_patch4_window7_224": ["timm_swin"],
    "timm/convnextv2_atto": ["timm_convnext"],
    "timm/resnet18": ["timm_conv"],
    "timm/skresnet18": ["timm_conv"],
    "timm/resnest14d": ["timm_conv"],
    "timm/regnety_002": ["timm_conv"],
    "timm/mobilenetv4_conv_small": ["timm_conv"],
    "timm/vgg11": ["timm_fallback"],
    "timm/levit_128s": ["timm_fallback"],
    "open_clip/RN50": ["open_clip", "clip_classifier"],
    "open_clip/roberta-ViT-B-32": [""],
}
KNOWN: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("name", SAMPLE)
def test_every_method_attaches_to_an_architecture_or_gives_a_reason(name: str) -> None:
    found = list(outcomes(name, methods.names(), EVERY, KNOWN))
    assert [o.host for o in found] == SAMPLE[name]
    for outcome in found:
        assert list(outcome.methods) == (methods.names() if outcome.host else [])
        for method, result in outcome.methods.items():
            assert "bug" not in result, result
            if "refused" in result:
                assert result["refused"].startswith(method)
            else:
                assert 0 < result["sites"] <= outcome.sites


def test_counts_are_those_of_the_layers() -> None:
    (resnet,) = outcomes("timm/resnet18", ["linear_probe", "full"], EVERY)
    assert resnet.methods["linear_probe"] == {"sites": 2, "trained": 1000 * 513}
    assert resnet.methods["full"]["trained"] == 11_689_512


def test_a_method_is_tried_again_only_where_its_sites_differ() -> None:
    known: dict[str, dict[str, Any]] = {}
    (small,) = outcomes("timm/vit_tiny_patch16_224", ["lora", "evp"], EVERY, known)
    (large,) = outcomes("timm/vit_tiny_patch16_384", ["lora", "evp"], EVERY, known)
    assert (small.tried, large.tried) == (2, 1)
    assert small.methods["lora"] == large.methods["lora"]
    assert small.methods["evp"]["trained"] < large.methods["evp"]["trained"]


def test_all_names_of_families_are_there() -> None:
    every = names()
    assert len(set(every)) == len(every)
    assert {"timm/resnet50", "timm/beit_large_patch16_512", "timm/skresnet34", "open_clip/RN50x64"} <= set(every)
    assert knows_a_family("timm.models.vision_transformer_hybrid")
    assert not knows_a_family("timm.models.vgg")


@dataclass(frozen=True)
class Broken(Method):
    """Fails with a foreign error, or leaves a hook."""

    name: ClassVar[str] = "broken"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[Need, ...]] = (Need(WeightSite),)
    default: ClassVar[tuple[str, ...]] = ("head",)

    def build(self, site: WeightSite) -> Adapter:
        """Never."""
        raise ZeroDivisionError("of what?")


class Stays(Adapter):
    """Leaves a hook on the head."""

    def enter(self, tower: nn.Module) -> None:
        """Hook it."""
        tower.get_submodule("fc").register_forward_hook(lambda *_: None)

    def weight(self, weight: Any) -> Any:
        """W."""
        return weight

    def output(self, x: Any, y: Any) -> Any:
        """Y."""
        return y


@dataclass(frozen=True)
class Leaving(Broken):
    """Leaves a hook."""

    name: ClassVar[str] = "leaving"

    def build(self, site: WeightSite) -> Adapter:
        """For the head."""
        return Stays()


@pytest.fixture
def broken() -> Iterator[None]:
    for method in (Broken, Leaving):
        methods.register(method)
    yield
    for method in (Broken, Leaving):
        methods.unregister(method.name)


@pytest.mark.usefixtures("broken")
def test_foreign_errors_and_leftovers_are_bugs() -> None:
    (found,) = outcomes("timm/resnet18", ["broken", "leaving", "linear_probe"], EVERY)
    assert found.methods["broken"] == {"bug": "ZeroDivisionError: of what?"}
    assert found.methods["leaving"]["bug"].startswith("detach left [('fc', ")
    assert found.methods["linear_probe"]["sites"] == 2
    text = page([found])
    assert "| `broken` | `timm_conv` | ZeroDivisionError: of what? | 1 (resnet18) |" in text


def test_finished_architectures_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "records.jsonl"
    done: list[str] = []
    monkeypatch.setattr(every_architecture, "names", lambda: ["timm/resnet18", "timm/vgg11", "timm/resnet26"])
    first = Outcome("timm/resnet18", "timm_conv", methods={"lora": {"sites": 1, "trained": 2}})
    records.write_text(json.dumps(asdict(first)) + '\n{"name": "timm/resn')
    found = run(records, ["timm_conv"], ["lora"], done.append)
    assert [line.split()[1] for line in done] == ["timm/vgg11", "timm/resnet26"]
    assert found[0] == first
    assert {o.name: o.host for o in found} == {
        "timm/resnet18": "timm_conv",
        "timm/vgg11": "timm_fallback",
        "timm/resnet26": "timm_conv",
    }
    assert run(records, ["timm_conv"], ["lora"], done.append) == found
    assert len(done) == 2
    run(records, ["timm_conv"], ["lora", "bitfit"], done.append)
    assert [line.split()[1] for line in done[2:]] == ["timm/resnet18", "timm/resnet26"]


def test_the_page_counts_hosts_methods_and_reasons() -> None:
    taken, refused = (
        {"sites": 3, "trained": 5},
        {"refused": "vpt: host timm_conv offers 7 of 'layer1.0.x'. Supported hosts: none."},
    )
    found = [
        Outcome("timm/a", "timm_conv", sites=10, tried=2, methods={"lora": taken, "vpt": refused}),
        Outcome("timm/b", "timm_conv", sites=20, tried=1, methods={"lora": taken, "vpt": refused}),
        Outcome("timm/c"),
        Outcome("open_clip/d", skipped=HUGGING),
    ]
    text = page(found)
    assert "| `timm_conv` | 2 | 10 to 20 | 2 | 2 | 3 |" in text
    assert "| `lora` | ✓ |" in text
    assert "| `vpt` | – |" in text
    assert "| `timm_conv` | host timm_conv offers n of … | `vpt`: 2 (a, b) |" in text
    assert "| no host matches its class | 1 (c) |" in text
    assert f"| {HUGGING} | 1 (d) |" in text


def test_reasons_are_grouped_without_sites_and_numbers() -> None:
    one = "layer1.0.stream: the block takes 64 channels to 256, and h has one width; select other sites"
    assert pattern(one) == "…: the block takes n channels to n, and h has one width; select other sites"
    assert pattern(one) == pattern(one.replace("layer1.0", "s2.b1").replace("64", "1,024"))
