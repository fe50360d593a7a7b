import pytest

from tests.raising import raises
from veneer.injection.errors import SelectionError
from veneer.injection.select import expand, parse, patterns, select
from veneer.injection.sites import ParamSite, WeightSite


def weight(name: str, role: str, tower: str = "unet", depth: int | None = None, **fields: object) -> WeightSite:
    return WeightSite(
        **{"name": name, "role": role, "path": name, "d_out": 2, "d_in": 2, "tower": tower, "depth": depth, **fields}
    )


SITES = [
    *(weight(f"d{d}.{r}", r, depth=d, stage=f"down.{d}") for d in range(2) for r in ("attn.q", "attn.k", "xattn.q")),
    *(weight(f"u{d}.{r}", r, depth=d, stage="up.0") for d in range(2, 4) for r in ("attn.q", "attn.k", "xattn.q")),
    weight("conv", "conv"),
    weight("fused", "attn.qkv", path="whole", fused=True, depth=4),
    weight("fused.q", "attn.q", path="whole", rows=(0, 2), depth=4),
    weight("fused.k", "attn.k", path="whole", rows=(2, 4), depth=4),
    weight("t.q", "attn.q", tower="text", depth=0),
]


def chosen(where: str) -> list[str]:
    return [s.name for s in select(SITES, where, frozenset({"unet"}))]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("xattn", ["d0.xattn.q", "d1.xattn.q", "u2.xattn.q", "u3.xattn.q"]),
        ("attn.{q,k}@0", ["d0.attn.q", "d0.attn.k"]),
        ("attn.q@1:3", ["d1.attn.q", "u2.attn.q"]),
        ("attn.q@-1:", ["fused.q"]),
        ("attn.q@-1", ["fused.q"]),
        ("attn.q@-3:-1", ["u2.attn.q", "u3.attn.q"]),
        ("text/attn.q", ["t.q"]),
        ("*/attn.q@0", ["d0.attn.q", "t.q"]),
        ("unet.down/attn.q", ["d0.attn.q", "d1.attn.q"]),
        ("unet.down.1/attn.q", ["d1.attn.q"]),
        ("name:d0.*", ["d0.attn.q", "d0.attn.k", "d0.xattn.q"]),
        ("name:conv", ["conv"]),
        ("conv text/attn", ["conv", "t.q"]),
        ("conv,text/attn", ["conv", "t.q"]),
    ],
)
def test_patterns_select_these_sites(where: str, expected: list[str]) -> None:
    assert chosen(where) == expected


def test_a_fused_weight_is_selected_only_by_its_full_role() -> None:
    assert chosen("attn@4") == chosen("attn.*@4") == ["fused.q", "fused.k"]
    assert chosen("attn.qkv") == ["fused"]


def test_whole_and_slice_of_one_tensor_are_refused() -> None:
    with raises(SelectionError, given=("fused.q", "fused")):
        chosen("attn.qkv attn.q@4")
    overlapping = [ParamSite(name=n, role="bias", path="p", param="bias", shape=(4,), tower="unet") for n in "ab"]
    with raises(SelectionError, given=("b", "a")):
        select(overlapping, "bias", frozenset({"unet"}))


def test_equal_paths_in_two_components_are_two_tensors() -> None:
    pair = [weight(f"{c}.q", "attn.q", component=c, path="q") for c in ("unet", "other")]
    assert len(select(pair, "attn.q", frozenset({"unet"}))) == 2


def test_the_error_for_a_pattern_without_a_match_lists_the_roles() -> None:
    with raises(SelectionError, pattern="mlp", given=()) as caught:
        chosen("attn.q mlp")
    assert "attn.q" in caught.value.expected
    assert select(SITES, "mlp", frozenset({"unet"}), strict=False) == []


@pytest.mark.parametrize("text", ["/attn", "attn@", "attn@a", "attn@1:2:3", "@3", "text/"])
def test_invalid_patterns(text: str) -> None:
    with raises(SelectionError, pattern=text):
        parse(text)


def test_braces_expand_and_hold_their_commas_together() -> None:
    assert expand("{a,b}.{c,d}") == ["a.c", "a.d", "b.c", "b.d"]
    assert patterns("attn.{q,v}@0:2, mlp  text/xattn.{k,v}") == ["attn.{q,v}@0:2", "mlp", "text/xattn.{k,v}"]
    assert patterns(["attn.{q,v} mlp", "conv"]) == ["attn.{q,v}", "mlp", "conv"]


def test_not_excludes_sites_in_any_order() -> None:
    assert chosen("xattn not:xattn@1:3") == chosen("not:xattn@1:3 xattn") == ["d0.xattn.q", "u3.xattn.q"]
    assert chosen("conv text/attn not:name:t.q") == ["conv"]
    with raises(SelectionError, pattern="not:nothing", given=()):
        chosen("conv not:nothing")


def test_a_default_with_a_fused_weight_and_its_slices_selects_the_fused_weight() -> None:
    selected = select(SITES, ("attn.qkv", "attn.{q,k}@2:", "nothing"), frozenset({"unet"}), strict=False)
    assert [s.name for s in selected] == ["u2.attn.q", "u2.attn.k", "u3.attn.q", "u3.attn.k", "fused"]


@pytest.mark.parametrize(
    ("where", "rejected"),
    [
        ("attn.{q,zz}", "attn.zz"),
        ("text/attn.{q,k}", "text/attn.k"),
        ("{unet,dit}/attn", "dit/attn"),
        ("xattn attn.q@1:99", "attn.q@1:99"),
        ("attn.q@-9:", "attn.q@-9:"),
        ("attn not:xattn.{q,zz}", "not:xattn.zz"),
        ("attn not:xattn", "not:xattn"),
        ("attn.k not:attn.{q,k}", "not:attn.q"),
    ],
)
def test_every_alternative_must_match_and_have_an_effect(where: str, rejected: str) -> None:
    with raises(SelectionError, pattern=rejected):
        chosen(where)


def test_defaults_may_name_alternatives_that_a_host_lacks() -> None:
    selected = select(SITES, ("attn.{q,zz}@:99", "not:mlp", "not:conv"), frozenset({"unet"}), strict=False)
    assert [s.name for s in selected] == ["d0.attn.q", "d1.attn.q", "u2.attn.q", "u3.attn.q", "fused.q"]


def test_braces_and_ranges_within_the_blocks_are_accepted() -> None:
    assert chosen("{unet,text}/attn.q@0") == ["d0.attn.q", "t.q"]
    assert chosen("attn.q@0:5") == ["d0.attn.q", "d1.attn.q", "u2.attn.q", "u3.attn.q", "fused.q"]
    assert chosen("*/attn.q@:5 not:text/attn") == chosen("attn.q@:5")
    assert chosen("attn.{q,k}@:4 not:attn.{q,k}@2:") == ["d0.attn.q", "d0.attn.k", "d1.attn.q", "d1.attn.k"]


def test_a_role_that_is_also_the_name_of_a_site_means_the_role() -> None:
    """For example `norm` in a ViT: the role of every norm, and the name of the last one."""
    sites = [weight("blocks.0.norm1", "norm", depth=0), weight("norm", "norm"), weight("name:x", "y")]
    for where, expected in (
        ("norm", ["blocks.0.norm1", "norm"]),
        ("name:norm", ["norm"]),
        ("norm not:name:norm", ["blocks.0.norm1"]),
    ):
        assert [s.name for s in select(sites, where, frozenset({"unet"}))] == expected
