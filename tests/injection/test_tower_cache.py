"""`cache_towers` caches towers until the next attach."""

from __future__ import annotations

import pytest
from torch import nn

from tests.injection.toy import net
from veneer.injection import attach
from veneer.injection.errors import UnsupportedSite
from veneer.injection.towers import cache_towers, towers_of


def test_towers_are_cached_until_something_is_attached() -> None:
    model, other = net(), net()
    uncached = towers_of(model)
    assert towers_of(model)[0] is not uncached[0]
    with cache_towers():
        first = towers_of(model)
        assert towers_of(model)[0] is first[0]
        assert towers_of(other)[0].module is other
        attach(model, "lora", where="attn.q", rank=2)
        again = towers_of(model)
        assert again[0] is not first[0]
        assert again[0].sites == first[0].sites
    assert towers_of(model)[0] is not again[0]


def test_a_model_without_a_host_is_rejected_each_time() -> None:
    unknown = nn.Linear(2, 2)
    with cache_towers():
        assert towers_of(unknown, strict=False) == []
        with pytest.raises(UnsupportedSite):
            towers_of(unknown)
