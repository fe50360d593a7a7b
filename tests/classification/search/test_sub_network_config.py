"""Configs of sub-networks: selections and sizes by site, learning rates, and `--method-where`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.classification.search.tiny_space import tiny_sites
from tests.classification.small import image_folder, model_folder
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.search.sub_network import SubNetwork
from veneer.classification.search.sub_network_config import config_of
from veneer.cli import main
from veneer.injection.errors import OptionError


def test_sizes_that_differ_are_options_by_site() -> None:
    config = config_of(TransferConfig(epochs=3), tiny_sites(), SubNetwork(((0, 0, 0, 0), (2, 0, 4, 2), (0, 0, 0, 1))))
    assert (config.method, config.epochs) == ("adaptformer+vpt", 3)
    assert config.method_where == {
        "adaptformer": "name:blocks.0.mlp.branch name:blocks.2.mlp.branch name:blocks.3.mlp.branch",
        "vpt": "name:blocks.3.tokens",
    }  # fmt: skip
    assert config.options == {
        "adaptformer": {"bottleneck": 2, "by_site": {"name:blocks.2.mlp.branch": {"bottleneck": 4}}}, "vpt": {"tokens": 1},
    }  # fmt: skip


def test_other_options_and_methods_without_a_size_stay() -> None:
    sites = tiny_sites(methods="bitfit, adaptformer(scale=0.5)", groups=2)
    config = config_of(TransferConfig(), sites, SubNetwork(((1, 0), (0, 4))))
    assert config.options == {"adaptformer": {"scale": 0.5, "bottleneck": 4}}
    assert {name.split(".")[1] for name in config.method_where["bitfit"].split()} == {"0", "1"}
    assert config.build_methods()[1].config()["scale"] == 0.5


@pytest.mark.parametrize(("rate", "expected"), [(None, 0.01), (2e-3, 0.02)])
def test_rates_keep_their_ratio_whichever_methods_there_are(rate: float | None, expected: float) -> None:
    """The default of vpt is ten times that of lora, the first method, which also sets the head's rate."""
    config = config_of(TransferConfig(learning_rate=rate), tiny_sites(), SubNetwork(((0,) * 4, (0,) * 4, (1,) * 4)))
    assert config.rate() == pytest.approx(expected)
    assert config.head_rate(False) == pytest.approx(expected / 10)


def test_method_where_selects_the_sites_of_one_method(tmp_path: Path) -> None:
    out = tmp_path / "run"
    data, model = image_folder(tmp_path / "images", 6), model_folder(tmp_path, "vit")
    words = f"transfer {data} --model {model} --method lora+vpt --where attn.q --rank 2 --epochs 1 --validation 0.3 --test 0.2"
    assert main([*words.split(), "--out", str(out), "--method-where", "vpt=tokens.block@1", "--dry-run"]) == 0
    with raises(OptionError, option="method_where", given=("ssf",), expected=("lora", "vpt")):
        TransferConfig(method="lora+vpt", method_where={"ssf": "attn"}).build_methods()
    config = TransferConfig(method="lora+vpt", where=("attn.q",), method_where={"vpt": "tokens.block@1 tokens.block@0"})
    assert config.selection_of("lora") == ("attn.q",)
    assert config.selection_of("vpt") == ("tokens.block@1 tokens.block@0",)


def test_a_run_without_method_where_has_the_identity_of_earlier_versions() -> None:
    assert "method_where" not in TransferConfig().identity()
    assert TransferConfig(method_where={"lora": "attn"}).identity()["method_where"] == {"lora": "attn"}
