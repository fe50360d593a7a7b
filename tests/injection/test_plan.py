"""Selection of sites and methods before an attach changes the host."""

import torch

from tests.injection.toy import Add, net
from tests.raising import raises
from veneer.injection import SelectionError, attach
from veneer.injection.attachment.plan import hosts_for, supports
from veneer.injection.method import Need
from veneer.injection.sites import TokenSite, WeightSite
from veneer.methods.prompt.vpt import VPT
from veneer.methods.reparameterized.low_rank.lora import LoRA


def test_a_need_checks_type_role_and_fields() -> None:
    class AttentionOnly(Add):
        needs = (Need(WeightSite, roles=("attn.*",), where={"kind": ("linear", "conv"), "called": True}),)

    def site(**fields: object) -> WeightSite:
        return WeightSite(**{"name": "s", "role": "attn.q", "path": "s", "d_out": 1, "d_in": 1, **fields})

    assert supports(AttentionOnly, site())
    assert supports(AttentionOnly, site(kind="conv"))
    assert not supports(AttentionOnly, site(kind="embedding"))
    assert not supports(AttentionOnly, site(called=False))
    assert not supports(AttentionOnly, site(role="mlp.in"))
    assert not supports(VPT, site())


def test_initial_values_do_not_depend_on_the_dtype_of_the_host() -> None:
    initial = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.manual_seed(4)
        tuned = attach(net().to(dtype), "lora", where="conv attn.{q,out}", rank=2)
        initial.append([p.detach().double() for p in tuned.parameters()])
    assert all(torch.equal(a, b) for other in initial[1:] for a, b in zip(initial[0], other, strict=True))


def test_train_takes_a_layer_whole_and_a_parameter_alone() -> None:
    assert list(attach(net(), "lora", where="attn.q", rank=2, train="head").extras) == ["head:weight", "head:bias"]
    assert list(attach(net(), "lora", where="attn.q", rank=2, train="bias.head").extras) == ["head.bias:bias"]


def test_the_error_for_a_default_without_a_match_lists_the_roles() -> None:
    class Elsewhere(Add):
        default = fallback = ("nowhere",)

    with raises(SelectionError, where="add", given=("nowhere",)) as caught:
        attach(net(), Elsewhere())
    assert "inner" in caught.value.expected


def test_fallback_is_used_if_the_default_matches_nothing() -> None:
    class Elsewhere(Add):
        default = ("nowhere",)
        fallback = ("attn.q",)

    tuned = attach(net(), Elsewhere())
    assert {site.role for site, _ in tuned.parts.values()} == {"attn.q"}
    assert tuned.where == ("attn.q",), "saved files have the selection that was used"

    class Both(Elsewhere):
        default = ("attn.k",)

    assert {site.role for site, _ in attach(net(), Both()).parts.values()} == {"attn.k"}


def test_supported_hosts_are_those_with_supported_sites() -> None:
    assert hosts_for(VPT) == ["clip_classifier", "open_clip", "timm_vit", "transformers_vit"]
    assert {"timm_vit", "diffusers_unet", "diffusers_dit", "clip_text", "toy"} <= set(hosts_for(LoRA))
    assert TokenSite in {n.site for n in VPT.needs}
