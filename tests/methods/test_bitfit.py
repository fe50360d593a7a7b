"""BitFit: y = W x + (b + db) at every bias, and nowhere else."""

import copy

import timm
import torch

from tests.hosts.published import build
from veneer.injection import attach
from veneer.injection.registry import hosts
from veneer.injection.towers import sites


def tiny(host: str, key: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return hosts.get(host)().tiny()[key]().double().eval()


def test_a_trained_bias_is_the_bias_of_the_base_plus_its_delta() -> None:
    model = tiny("timm_vit", "vit")
    explicit, inputs = copy.deepcopy(model), hosts.get("timm_vit")().sample(model)
    tuned = attach(model, "bitfit")
    with torch.no_grad():
        for site, adapter in tuned.parts.values():
            adapter.delta.normal_(std=0.1)
            bias = explicit.get_submodule(site.path).bias
            bias[slice(*site.rows) if site.rows else ...] += adapter.delta
        torch.testing.assert_close(model(**inputs), explicit(**inputs))
    tuned.merge()
    for name, p in explicit.named_parameters():
        torch.testing.assert_close(tuned.host_state_dict()[name], p.detach(), msg=name)


def test_gradients_are_the_biases_own() -> None:
    model = tiny("timm_vit", "vit")
    plain, inputs = copy.deepcopy(model), hosts.get("timm_vit")().sample(model)
    tuned = attach(model, "bitfit")
    for each in (model, plain):
        each(**inputs).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and "veneer" not in n} == set()
    for site, adapter in tuned.parts.values():
        expected = plain.get_submodule(site.path).bias.grad[slice(*site.rows) if site.rows else ...]
        torch.testing.assert_close(adapter.delta.grad, expected, msg=site.name)
    assert sum(a.delta.numel() for _, a in tuned.parts.values()) == sum(
        p.numel() for n, p in plain.named_parameters() if n.endswith("bias") and not n.startswith("head")
    )


def test_published_counts() -> None:
    """ViT-B/16: 102,912 biases without the head. SD 1.5's UNet: 343,684."""
    with torch.device("meta"):
        vits = [timm.create_model("vit_base_patch16_224", num_classes=n) for n in (0, 1000)]
    assert [attach(vit, "bitfit").report().trainable for vit in vits] == [102_912] * 2
    assert attach(build("sd15"), "bitfit").report().trainable == 343_684


def test_the_head_is_the_callers() -> None:
    """Trained as base parameters, or by a linear probe beside, once. `bias` alone still selects it."""
    model = tiny("timm_vit", "vit")
    tuned = attach(model, "bitfit", train=("head",))
    assert {key for key in tuned.extras if key.startswith("head")} == {"head:weight", "head:bias"}
    assert not [name for name in tuned.parts if name.startswith("head")]
    both = tiny("timm_vit", "vit")
    inputs = hosts.get("timm_vit")().sample(both)
    own = attach(both, "bitfit")
    attach(both, "linear_probe")
    bare = both(**inputs).detach()
    with torch.no_grad():
        for p in (p for n, p in both.named_parameters() if p.requires_grad and p.shape == (bare.shape[-1],)):
            p += 1
    torch.testing.assert_close(both(**inputs), bare + 1)
    assert "head.bias" not in own.parts
    assert "head.bias" in attach(tiny("timm_vit", "vit"), "bitfit", where="bias").parts


def test_a_key_bias_is_counted_and_reported_as_inert() -> None:
    tuned = attach(tiny("timm_vit", "vit"), "bitfit")
    keys = [s.name for s in sites(tiny("timm_vit", "vit")) if s.role == "bias.attn.k"]
    assert list(tuned.report().inert) == keys
    assert len(keys) == 2
    tuned.probe()
