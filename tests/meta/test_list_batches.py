"""The suite compares the rows of models whose batches are lists, such as Z-Image."""

from __future__ import annotations

import pytest
import torch

from tests.meta.adapters import BAD, Good
from veneer.hosts.diffusers_dit import DiffusersDiT
from veneer.injection.method import Method
from veneer.testing.case import Case, usable_sites
from veneer.testing.checks_run import _repeat_first, batch_rows_are_independent


def _case(method: type[Method]) -> Case:
    config, other = method.examples()
    sites = tuple(s for s in usable_sites(config, DiffusersDiT(), "z_image") if s.role == "attn.q")
    return Case(config, DiffusersDiT(), "z_image", sites, other)


def test_an_adapter_that_mixes_rows_fails_and_another_passes() -> None:
    batch_rows_are_independent(_case(Good))
    with pytest.raises(AssertionError):
        batch_rows_are_independent(_case(BAD["it leaks state between batch rows"][0]))


def test_the_second_row_of_a_list_is_replaced_by_the_first() -> None:
    rows = [torch.zeros(2), torch.ones(2)]
    first, second = _repeat_first(rows)
    assert torch.equal(second, rows[0])
    assert second is not first
