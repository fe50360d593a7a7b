"""Seeds: pinned values, unambiguous encoding, independence of the order of use."""

import pytest
import torch

from veneer.training.loop.seeds import generator, mix


def test_values_are_pinned():
    """On every machine and in every process, though Python salts its own hashes."""
    assert mix() == 8238016292129134938
    assert mix(0) == 6148773199958884930
    assert mix(7, "noise", 3, -1) == 600685984378708220


def test_parts_do_not_run_together():
    seeds = {mix(1, 23), mix(12, 3), mix(123), mix("123"), mix("1", "23"), mix(1, "23"), mix("1,23"), mix(-1, 23), mix(1, 23, "")}
    assert len(seeds) == 9


def test_seeds_are_63_bits_and_spread():
    seeds = [mix("spread", i) for i in range(4000)]
    assert len(set(seeds)) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    for bit in range(63):  # torch's CPU generator uses the low 32 bits: each must be as good as the others
        share = sum(seed >> bit & 1 for seed in seeds) / 4000
        assert 0.45 < share < 0.55


def test_big_numbers_and_any_letters_are_fine():
    assert mix(2**200) != mix(2**200 + 1)
    assert mix("é") != mix("e\u0301")
    assert isinstance(mix("\udc80"), int)  # a file name that is not UTF-8


@pytest.mark.parametrize("part", [1.0, None, True, b"x", torch.tensor(1)])
def test_other_types_are_refused(part):
    with pytest.raises(TypeError, match=type(part).__name__):
        mix("seed", part)


def test_generators_know_nothing_of_each_other():
    alone = torch.randn(4, generator=generator(3, "noise", 5))
    torch.manual_seed(0)
    torch.randn(100, generator=generator(3, "noise", 4))
    before = torch.get_rng_state()
    assert torch.equal(torch.randn(4, generator=generator(3, "noise", 5)), alone)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert not torch.equal(torch.randn(4, generator=generator(4, "noise", 5)), alone)
