"""Reports of attachments: coverage of blocks and parameter counts."""

import dataclasses

from tests.injection.toy import ToyHost, net
from veneer.injection import attach, hosts


def test_blocks_that_lack_a_role_are_shown() -> None:
    report = attach(net(), "lora", where="conv attn.{q,v} mlp.in", rank=2).report()
    rows = {r.block: (r.roles, r.missing_roles) for r in report.rows}
    assert rows == {
        "0": (("conv",), ("attn.q", "attn.v", "mlp.in")),
        "1": (("attn.q", "attn.v"), ("conv", "mlp.in")),
        "2": (("mlp.in",), ("attn.q", "attn.v", "conv")),
    }
    assert len(report.uneven) == 3
    assert "uneven: 3 of 3 blocks miss a role that others have" in str(report)


def test_a_block_without_any_site_is_a_row_too() -> None:
    report = attach(net(), "lora", where="attn", rank=2).report()
    assert {r.block: r.trainable for r in report.rows} == {"0": 0, "1": 2 * 3 * 12 + 2 * 12, "2": 0}
    assert [r.block for r in report.uneven] == ["0", "2"]


def test_counts_are_the_parameters() -> None:
    model = net()
    base = sum(p.numel() for p in model.parameters()) + 13  # BatchNorm's two statistics of 6 and its counter
    tuned = attach(model, "lora", where="attn.{q,out} head", rank=2)
    report = tuned.report()
    assert (report.sites, report.base) == (3, base)
    assert report.trainable == report.stored == 2 * (12 + 12 + 9)
    assert f"66 trainable parameters = {6600 / base:.3f} % of {base}" in str(report)
    with_norm = attach(net(), "lora", where="attn.q", rank=2, train="norm").report()
    assert with_norm.trainable == 24 + 6


def test_a_level_outside_blocks_counts_as_covered_by_any_of_its_sites() -> None:
    class Levels(ToyHost):
        def sites(self, *args: object) -> object:
            for site in super().sites(*args):
                yield dataclasses.replace(site, stage={"conv": "down", "head": "up"}.get(site.role))

    hosts.unregister("toy")
    hosts.register(Levels)
    report = attach(net(), "lora", where="attn.q", rank=2).report()
    assert {(r.stage, r.block, r.missing_roles) for r in report.uneven} == {
        ("down", "0", ("attn.q",)), ("", "2", ("attn.q",)), ("up", "", ("attn.q",)),
    }  # fmt: skip
    report = attach(net(), "lora", where="attn.q head", rank=2).report()
    assert ("up", "", ("head",), ()) in [(r.stage, r.block, r.roles, r.missing_roles) for r in report.rows]
