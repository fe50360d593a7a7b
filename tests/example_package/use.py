"""What a user does with the installed package: `python use.py FOLDER` names, attaches, trains, saves, loads, merges."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from veneer_example.resmlp import ResMLP

import veneer
from veneer import transformer_records
from veneer.testing import check_host, check_method

folder = Path(sys.argv[1])
assert "gain" in veneer.methods.names()
assert veneer.methods.source("gain") == "veneer-example"
assert "resmlp" in veneer.hosts.names()
assert {row["name"]: row["source"] for row in veneer.methods.table()}["gain"] == "veneer-example"
assert "clay" in transformer_records.names()
assert not {"diffusers", "veneer_example.clay"} & {*sys.modules}  # a record imports no models

records = [*check_method("gain", "resmlp"), *check_host("resmlp"), *check_host("diffusers_dit", models=("clay",))]
failed = [str(r) for r in records if r.outcome == "failed"]
assert not failed, failed
assert {"identity_at_start", "save_load_save_is_byte_equal", "ports_in_order"} <= {
    r.check for r in records if r.outcome == "passed"
}

torch.manual_seed(0)
base = ResMLP().eval()
model, again = copy.deepcopy(base), copy.deepcopy(base)
features, classes = torch.randn(24, 5), torch.randint(3, (24,))
tuned = veneer.attach(model, "gain", where="mlp", train=("head",), sample=True)
optimizer = torch.optim.Adam(tuned.parameters(), 3e-2)
losses = []
for _ in range(60):
    loss = F.cross_entropy(model(features), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.8 * losses[0], losses[::10]
assert torch.equal(model.stem.weight, base.stem.weight)

path = tuned.save(folder / "adapter")
trained = model(features).detach()
assert not torch.allclose(trained, base(features))
loaded = veneer.load(again, path)
assert loaded.method == tuned.method
assert torch.equal(again(features), trained)

weight = base.blocks[0].up.weight
gain = dict(tuned.named_parameters())["blocks.0.up:gain"].detach()
tuned.merge()
merged = dict(tuned.host_state_dict())["blocks.0.up.weight"]
torch.testing.assert_close(merged, weight.detach() * (1 + gain)[:, None])
torch.testing.assert_close(model(features), trained)
tuned.unmerge()
tuned.detach()
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))

from veneer_example.clay import ClayTransformer  # noqa: E402 (with diffusers, which takes seconds)

clay = ClayTransformer().eval()
inputs = {"hidden_states": torch.randn(2, 6, 4), "timestep": torch.rand(2)}
before = clay(**inputs)
lora = veneer.attach(clay, "lora", rank=2, where=("attn", "mlp"))
assert len(lora.parts) == 12
assert torch.equal(clay(**inputs), before)
clay(**inputs).square().mean().backward()
torch.optim.Adam(lora.parameters(), 1e-2).step()
changed = clay(**inputs)
assert not torch.allclose(changed, before)
path = lora.save(folder / "clay")
lora.detach()
veneer.load(clay, path)
assert torch.equal(clay(**inputs), changed)
print("used")
