"""MaPLe beside its authors' prompt learner and towers."""

from __future__ import annotations

import copy
from typing import Any

import torch

from tests.parity.clip import CLIP, NAMES, TOKENIZER, classifier, clip
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import link, links
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("muzairkhattak/multimodal-prompt-learning", "69bce21ae8eda80ad6187534b2dce09cf6c59e17")
METHODS = ("maple",)
DESIGN = {"trainer": "MaPLe", "vision_depth": 0, "language_depth": 0, "vision_ctx": 0, "language_ctx": 0, "maple_length": 2}


def rows() -> list[Row]:
    """Logits and gradients with three prompted layers."""
    (base,) = clip(ORACLE, DESIGN)
    base.requires_grad_(False)
    widths = {"768": "128", "512": "64", ".half()": ".double()"}
    namespace = {"clip": CLIP, "_tokenizer": TOKENIZER, "copy": copy, "print": lambda *text: None}
    names = ("TextEncoder", "_get_clones", "MultiModalPromptLearner", "CustomCLIP")
    code = ORACLE.definitions("trainers/maple.py", *names, replace=widths, **namespace)
    trainer = options(MAPLE=options(N_CTX=2, CTX_INIT="a photo of a", PROMPT_DEPTH=3))
    theirs = code.CustomCLIP(options(TRAINER=trainer, INPUT=options(SIZE=(32, 32))), NAMES, base).double().eval()
    learner = theirs.prompt_learner
    perturb(learner, 0.05)
    model = classifier(base)
    ours: Any = attach(model, "maple", depth=3).parts["head.prompts"][1]
    pairs: Any = [
        (ours.context, link(learner.ctx)),
        (ours.deep, lambda read: torch.stack([read(p) for p in learner.compound_prompts_text])),
    ]
    for mine, other in zip(ours.project, [learner.proj, *learner.compound_prompt_projections], strict=True):
        pairs += links(mine, other, weight="weight", bias="bias")
    image = randn(3, 3, 32, 32)
    return [Row("maple", "a CLIP: logits, gradients", measure(lambda: model(image), lambda: theirs(image), pairs))]
