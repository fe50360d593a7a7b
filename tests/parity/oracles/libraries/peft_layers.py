"""Weight updates and rotations beside peft, on the linear layers of a ViT's MLPs."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft.utils.incremental_pca import IncrementalPCA

from tests.parity.measure import Row, largest_difference, measure, randn
from tests.parity.models import DEPTH, images, links, offset_link, perturb_trained, vits
from tests.parity.oracle import Package
from veneer.injection import attach
from veneer.methods.reparameterized.low_rank._explained_variance import PrincipalComponents

ORACLE = Package("peft", "peft")
METHODS = ("adalora", "boft", "dora", "ia3", "loha", "lokr", "lora", "oft", "vera")
LORA = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}
LINEARS = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
COMPARED = "the MLPs of a ViT: outputs, gradients"
ADALORA = {"down": "lora_A.default", "up": "lora_B.default"}


def rows() -> list[Row]:
    """Every kind that both have, and the starts of LoRA."""
    target = {"target_modules": ["fc1", "fc2"]}
    lora = {"r": 3, "lora_alpha": 6, **target}
    ours = {"rank": 3, "alpha": 6.0}
    hadamard = {f"{side}{i}": f"hada_w{i}_{end}.default" for i in (1, 2) for side, end in (("up", "a"), ("down", "b"))}
    kron = {"left": "lokr_w1.default", "right_up": "lokr_w2_a.default", "right_down": "lokr_w2_b.default"}
    adalora = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, total_step=20, **target)
    return [
        _row("lora", peft.LoraConfig(**lora), LORA, ours),
        _row("lora", peft.LoraConfig(use_rslora=True, **lora), LORA, {**ours, "rslora": True}, "rslora, "),
        _starts(),
        _components(),
        _row("dora", peft.LoraConfig(use_dora=True, **lora), LORA, ours),
        _row("loha", peft.LoHaConfig(r=3, alpha=1.5, **target), hadamard, {"rank": 3, "alpha": 1.5}),
        _row("lokr", peft.LoKrConfig(r=2, alpha=3.0, **target), kron, {"rank": 2, "alpha": 3.0, "factor": -1}),
        _row(
            "oft",
            peft.OFTConfig(r=4, oft_block_size=0, **target),
            {"skew": "oft_R.default.weight"},
            {"blocks": 4, "neumann_terms": 5},
        ),
        _row(
            "boft", peft.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=1, **target), {}, {"m": 1, "b": 8, "rescale": True}
        ),
        _row("vera", peft.VeraConfig(r=5, **target), {"b": "vera_lambda_b.default", "d": "vera_lambda_d.default"}, {"rank": 5}),
        _row("ia3", peft.IA3Config(target_modules=["fc2"], feedforward_modules=["fc2"]), {}, {}),
        _row("adalora", adalora, ADALORA, {"rank": 4, "target_rank": 2, "alpha": 8 * 4 / (4 + 1e-5)}),
    ]


def _row(method: str, config: Any, names: dict[str, str], options: dict[str, Any], kind: str = "") -> Row:
    model, theirs = vits()
    peer: Any = peft.get_peft_model(theirs, config)
    for name, p in peer.named_parameters():
        p.requires_grad_(p.requires_grad and "ranknum" not in name)  # a number of triplets, which peft leaves trainable
    perturb_trained(peer)
    peer.eval()
    sites = {"fc2": "mlp.fc2"} if method == "ia3" else LINEARS
    tuned = attach(model, method, where="mlp.out" if method == "ia3" else "mlp.in mlp.out", **options)
    pairs: Any = []
    for depth in range(DEPTH):
        for name, site in sites.items():
            adapter: Any = tuned.parts[f"blocks.{depth}.{site}"][1]
            layer = peer.base_model.model.blocks[depth].mlp.get_submodule(name)
            pairs += [*links(adapter, layer, **names), *_more(method, adapter, layer)]
    if method == "vera":
        _copy_random_factors(adapter.shared, peer.base_model)
    run = (lambda: model(images()), lambda: peer.base_model.model(images()))
    compared = f"{kind}{COMPARED}"
    if method == "boft":  # peft trains a full matrix, whose skew part is a projection
        return Row(method, compared.replace(", gradients", ""), measure(*run, pairs, gradients=False))
    return Row(method, compared, measure(*run, pairs))


def _more(method: str, adapter: Any, layer: Any) -> list[Any]:
    """Links that are no plain copies."""
    if method == "dora":
        norm = layer.get_base_layer().weight.detach().norm(dim=1)
        return [(adapter.magnitude_delta, offset_link(layer.lora_magnitude_vector["default"].weight, norm))]
    if method == "adalora":
        return [(adapter.values, lambda read: read(layer.lora_E["default"]).flatten())]
    if method == "ia3":
        vector = layer.ia3_l["default"]
        return [(adapter.delta, lambda read: (vector - 1 if read(vector) is vector else read(vector)).flatten())]
    if method == "boft":
        matrices, (i, j) = layer.boft_R["default"], torch.triu_indices(8, 8, 1)
        skew = (adapter.skew, lambda read: -(read(matrices) - read(matrices).mT)[..., i, j] / 2)
        return [skew, (adapter.magnitude, lambda read: read(layer.boft_s["default"]).flatten())]
    return []


def _copy_random_factors(shared: Any, theirs: Any) -> None:
    with torch.no_grad():
        shared.A.copy_(theirs.vera_A["default"])
        shared.B.copy_(theirs.vera_B["default"])


def _starts() -> Row:
    """A and B of PiSSA and OLoRA as they are initialized."""
    pairs = []
    for init in ("pissa", "olora"):
        model, theirs = vits()
        peer: Any = peft.get_peft_model(
            theirs.float(), peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=init, target_modules=["fc1"])
        )
        adapter: Any = attach(model.float(), "lora", rank=3, alpha=6.0, init=init, where="mlp.in").parts["blocks.0.mlp.fc1"][1]
        layer = peer.base_model.model.blocks[0].mlp.fc1
        pairs += [(adapter.up @ adapter.down, layer.lora_B["default"].weight @ layer.lora_A["default"].weight)]
    return Row("lora", "initial B A of PiSSA and OLoRA", largest_difference(pairs), "float32")


def _components() -> Row:
    """Explained variances of EVA's incremental decomposition."""
    ours, theirs = PrincipalComponents(3), IncrementalPCA(n_components=3)
    for seed in range(3):
        batch = randn(12, 9, seed=seed)
        ours.update(batch)
        theirs.partial_fit(batch)
    return Row("lora", "explained variances of EVA", largest_difference([(ours.ratios, theirs.explained_variance_ratio_)]))
