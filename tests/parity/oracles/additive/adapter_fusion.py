"""AdapterFusion beside the module of AdapterHub."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.methods.bottlenecks import branch
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import links
from tests.parity.oracle import Repository, options
from veneer.methods.additive.experts.adapter_fusion import AdapterFusion

ORACLE = Repository("adapter-hub/adapters", "88f18ebd6c127f0e0ddf7c76cb84b37a39b82c12")
METHODS = ("adapter_fusion",)
CONFIG = {
    "query": True, "key": True, "value": True, "query_before_ln": False, "regularization": True, "residual_before": False,
    "temperature": False, "value_before_softmax": True, "value_initialized": True,
}  # fmt: skip


def rows() -> list[Row]:
    """One fusion of three adapters, without dropout."""
    initializer = options(init_bert_weights=lambda module: None)
    code = ORACLE.definitions("src/adapters/methods/modeling.py", "BertFusion", AdapterFusionConfig=dict, Adapter=initializer)
    theirs = code.BertFusion(CONFIG, 16, 0.0).double()
    perturb(theirs)
    method = AdapterFusion(("a", "b", "c"), fused={"method": "houlsby", "options": {"bottleneck": 4}})
    ours: Any = method.build(branch(width=16)).double()
    with torch.no_grad():
        for buffer in ours.adapters.buffers():
            if buffer.ndim:
                buffer.normal_(std=0.5)
    pairs = links(ours, theirs, query="query.weight", query_bias="query.bias", key="key.weight", value="value.weight")
    x = randn(2, 7, 16)
    outputs = [F.gelu(x @ a.down.T + a.down_bias) @ a.up.T + a.up_bias for a in ours.adapters]
    up = torch.stack(outputs, 2)
    difference = measure(lambda: ours.output(x, x), lambda: theirs(x, up, up, x.clone()), pairs)
    text = "no bias of the keys, whose gradient is zero"
    return [Row("adapter_fusion", "one fusion: outputs, gradients", difference, deviations=text)]
