"""Spaces: parameter counts of attached sub-networks, budgets, the rules of each space, and what they reject."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.classification.search.tiny_space import BUDGETS, METHODS, tiny_sites, tiny_space, tiny_vit
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.search.block_sites import LARGEST, BlockSites, group_bounds
from veneer.classification.search.block_spaces import BlockSpace, PrefixSpace, depth_of
from veneer.classification.search.search_methods import parse_methods
from veneer.classification.search.spaces import SPACES
from veneer.classification.search.spindle_space import SpindleSpace
from veneer.classification.search.sub_network import SubNetwork
from veneer.classification.search.sub_network_config import config_of, single_method
from veneer.injection import UnknownName, attach
from veneer.injection.errors import OptionError, UnsupportedSite


def generations(name: str, seed: int = 0, budget: int | None = None) -> list[SubNetwork]:
    """Sampled, mutated and crossed sub-networks."""
    space, rng = tiny_space(name, budget), random.Random(seed)
    samples = [space.sample(rng) for _ in range(12)]
    mutations = [space.mutate(sub, rng, 0.5) for sub in samples]
    return [*samples, *mutations, *(space.cross(a, b, rng) for a, b in zip(samples, mutations[1:], strict=False))]


@pytest.mark.parametrize("name", SPACES)
def test_sub_networks_have_the_counted_parameters_within_the_budget(name: str) -> None:
    space, model = tiny_space(name), tiny_vit()
    subs = generations(name)
    assert all(0 < space.parameters(sub) <= BUDGETS[name] for sub in subs)
    for sub in subs[::9]:
        config = config_of(TransferConfig(), space.sites, sub)
        attached = [attach(model, method, where=config.selection_of(method.name)) for method in config.build_methods()]
        assert sum(p.numel() for a in attached for p in a.parameters()) == space.parameters(sub)
        sizes = {a.method.name: Counter(site.depth for site, _ in a.parts.values()) for a in attached}
        for method, row in zip(space.sites.names, sub.sizes, strict=True):
            bounds = [range(*bound) for bound, size in zip(space.sites.groups, row, strict=True) if size]
            assert {*sizes.get(method, {})} == {block for bound in bounds for block in bound}
        for each in reversed(attached):
            each.detach()


@pytest.mark.parametrize("name", SPACES)
def test_sub_networks_are_a_function_of_the_seed(name: str) -> None:
    assert generations(name) == generations(name)
    assert generations(name) != generations(name, seed=1)
    assert len(set(generations(name))) > 10


@pytest.mark.parametrize("name", SPACES)
def test_the_smallest_budget_has_sub_networks(name: str) -> None:
    least = tiny_space(name).least_parameters()
    subs = generations(name, budget=least)
    assert all(0 < tiny_space(name, least).parameters(sub) <= least for sub in subs)
    with raises(OptionError, option="budget_parameters", given=least - 1, expected=least):
        tiny_space(name, least - 1)


def test_noah_has_each_method_in_the_first_blocks_only() -> None:
    """With four blocks, t is 0 to 4; with eight in groups of one, only even t."""
    for sub in generations("noah"):
        assert all(all(row[: depth_of(row)]) for row in sub.sizes)
    space = PrefixSpace(tiny_sites(depth=8), 10**6)
    assert list(space.depths) == [0, 2, 4, 6, 8]
    rng = random.Random(0)
    subs = [space.mutate(space.sample(rng), rng, 0.2) for _ in range(40)]
    assert {depth_of(row) for sub in subs for row in sub.sizes} == {0, 2, 4, 6, 8}


def test_noah_without_sites_in_the_first_blocks() -> None:
    """The smallest sub-network has the fewest groups that have sites of its method."""
    sites = tiny_sites(methods="lora(where=attn@2:4), vpt(where=tokens.block@3)")
    space = PrefixSpace(sites, PrefixSpace(sites, 10**6).least_parameters())
    assert space.budget == min(sites.count(0, 2, 1), sites.count(1, 3, 1)) > 0
    assert {space.sample(random.Random(seed)) for seed in range(20)} == {SubNetwork(((0,) * 4, (0, 0, 0, 1)))}
    large, rng = PrefixSpace(sites, 10**6), random.Random(0)
    sizes = {large.mutate(large.sample(rng), rng, 0.5).sizes for _ in range(60)}
    assert {depth_of(lora) for lora, _ in sizes} == {0, 3, 4}
    assert not any(lora[0] or lora[1] or any(vpt[:3]) for lora, vpt in sizes)


def test_mutations_change_no_choice_or_all() -> None:
    """With probability 0 the sub-network of the space blocks stays; noah may still change the depth, never a kept size."""
    blocks, noah = tiny_space("blocks"), tiny_space("noah")
    for seed in range(20):
        rng = random.Random(seed)
        sub = blocks.sample(rng)
        assert blocks.mutate(sub, rng, 0.0) == sub
        sub = noah.sample(rng)
        pairs = zip(sub.sizes, noah.mutate(sub, rng, 0.0).sizes, strict=True)
        assert all(new <= old or not old for row, changed in pairs for old, new in zip(row, changed, strict=True))
    changes = {blocks.mutate(blocks.sample(random.Random(1)), random.Random(seed), 1.0) for seed in range(20)}
    assert len(changes) > 10


def test_crossovers_take_each_method_from_a_parent() -> None:
    space = BlockSpace(tiny_sites("blocks"), 10**6)
    rng = random.Random(0)
    first, second = space.sample(rng), space.sample(rng)
    children = {space.cross(first, second, rng) for _ in range(60)}
    assert len(children) == 2**3
    assert all(row in pair for child in children for row, *pair in zip(child.sizes, first.sizes, second.sizes, strict=True))


def test_s4_gives_each_block_the_same_share_with_the_largest_sizes() -> None:
    space = tiny_space("s4")
    assert space.sites.groups == ((0, 1), (1, 2), (2, 3), (3, 4))
    share = BUDGETS["s4"] / space.sites.blocks
    for sub in generations("s4"):
        for group in range(4):
            members = [m for m, row in enumerate(sub.sizes) if row[group]]
            assert members
            for m in members:
                cost, size = share / len(members), sub.sizes[m][group]
                assert space.sites.count(m, group, size) <= cost
                if space.sites.methods[m].is_scalable:
                    assert space.sites.count(m, group, size + 1) > cost


def test_s4_of_the_paper_is_evaluated_first() -> None:
    (sub,) = tiny_space("s4").initial()
    assert [[bool(size) for size in row] for row in sub.sizes] == [
        [True, True, True, False], [False, True, True, True], [False, False, True, True], [True, False, False, True],
    ]  # fmt: skip
    assert list(SpindleSpace(tiny_sites("s4", METHODS), 9000).initial()) == []


def test_groups_of_blocks() -> None:
    assert group_bounds(12, 4, spindle=True) == ((0, 2), (2, 6), (6, 10), (10, 12))
    assert group_bounds(12, 3) == ((0, 4), (4, 8), (8, 12))
    for blocks in range(1, 26):
        for groups in range(1, blocks + 1):
            for spindle in (False, True):
                bounds = group_bounds(blocks, groups, spindle=spindle)
                assert [b for first, end in bounds for b in range(first, end)] == [*range(blocks)]
                assert all(first < end for first, end in bounds)
    with raises(OptionError, option="groups", given=5, expected=4):
        tiny_sites(groups=5)


def test_a_single_method_has_the_largest_size_of_the_budget() -> None:
    sites = tiny_sites()
    sub = single_method(sites, 0, 1600)
    assert sub is not None
    (size,) = set(sub.sizes[0])
    assert sum(sites.count(0, g, size) for g in range(4)) <= 1600 < sum(sites.count(0, g, size + 1) for g in range(4))
    assert single_method(sites, 0, 100) is None
    assert single_method(sites, 0, 10**9) == SubNetwork(((LARGEST,) * 4, (0,) * 4, (0,) * 4))
    fixed = tiny_sites(methods="lora(rank=2), adaptformer")
    assert single_method(fixed, 0, 10**6) == SubNetwork(((2, 2, 2, 2), (0, 0, 0, 0)))


@pytest.mark.parametrize(
    ("methods", "option", "given"),
    [
        ("lora, lora(rank=2)", "methods", ("lora", "lora")),
        ("lora+vpt", "methods", "lora+vpt"),
        ("full", "methods", "full"),
        ("scratch", "methods", "scratch"),
        ("zero_shot", "methods", "zero_shot"),
        ("prefix_tuning", "methods", "prefix_tuning"),
        ("vera", "methods", "vera"),
        ("e2vpt(segments=8)", "tokens", (1, 2, 4)),
    ],
)
def test_methods_that_a_block_cannot_have_alone_are_rejected(methods: str, option: str, given: object) -> None:
    with raises(OptionError, option=option, given=given):
        tiny_sites(methods=methods)


def test_unknown_and_unsupported_methods_are_rejected() -> None:
    with raises(UnknownName, name="lorra", kind="method"):
        parse_methods("lorra", (1,))
    with raises(UnsupportedSite, method="evp", given=(), expected="sites in blocks"):  # its site is the image
        BlockSites(tiny_vit(), parse_methods("lora, evp", (1,)))
