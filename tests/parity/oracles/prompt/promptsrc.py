"""PromptSRC beside its authors' model and its three regularizers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.nn import functional as F

from tests.parity.clip import CLIP, NAMES, TOKENIZER, classifier, clip
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import link
from tests.parity.oracle import Repository, options
from veneer.injection import attach
from veneer.training.objective.consistency import symmetric_kl
from veneer.training.objective.forward_passes import ForwardPasses

ORACLE = Repository("muzairkhattak/PromptSRC", "bb95c77b634d63488f2cad81ff4a72d53bdd06d5")
METHODS = ("promptsrc",)
LABELS = torch.tensor([0, 2, 1])


def rows() -> list[Row]:
    """Loss with the regularizers and gradients, three prompted layers in both towers."""
    designs = (
        {"trainer": "IVLP", "vision_depth": d, "language_depth": d, "vision_ctx": c, "language_ctx": c}
        for d, c in ((0, 0), (3, 4))
    )
    plain, base = clip(ORACLE, *designs)
    templates = ORACLE.definitions("trainers/imagenet_templates.py", "IMAGENET_TEMPLATES").IMAGENET_TEMPLATES
    namespace = {
        "clip": CLIP,
        "_tokenizer": TOKENIZER,
        "copy": copy,
        "print": lambda *text: None,
        "IMAGENET_TEMPLATES": templates,
    }
    code = ORACLE.definitions(
        "trainers/promptsrc.py", "TextEncoder", "VLPromptLearner", "CustomCLIP", load_clip_to_cpu=lambda *arguments: plain,
        replace={".half()": ".double()", ".cuda()": "", ".float()": ""}, **namespace,
    )  # fmt: skip
    trainer = options(PROMPTSRC=options(N_CTX_TEXT=4, CTX_INIT="a photo of a", PROMPT_DEPTH_TEXT=3, N_CTX_VISION=4))
    config = options(TRAINER=trainer, INPUT=options(SIZE=(32, 32)), OPTIM=options(MAX_EPOCH=20))
    theirs = code.CustomCLIP(config, NAMES, base).double()
    visual, blocks = base.visual, base.transformer.resblocks
    images = [visual.VPT, *(visual.transformer.resblocks[i].VPT_shallow for i in (1, 2))]
    texts = [blocks[i].VPT_shallow for i in (1, 2)]
    perturb(torch.nn.ParameterList([*images, *texts, theirs.prompt_learner.ctx]), 0.05)
    model = classifier(plain).train()
    tuned = attach(model, "promptsrc", depth=3)
    ours: Any = tuned.parts["head.prompts"][1]
    pairs: Any = [(ours.context, link(theirs.prompt_learner.ctx)), (ours.deep, _stacked(texts)), (ours.images, _stacked(images))]
    pixels = randn(3, 3, 32, 32)
    theirs.train()

    def loss() -> Any:
        logits, extra = ForwardPasses([tuned])(0, lambda: model(pixels), symmetric_kl)
        return F.cross_entropy(logits, LABELS) + extra.mean() + tuned.penalty()

    def reference() -> Any:
        entropy, text, fixed_text, fixed_image, image, fixed_logits, logits = theirs(pixels, LABELS)
        change = F.l1_loss(text, fixed_text) * 25 + F.l1_loss(image, fixed_image) * 10
        divergence = (
            F.kl_div(F.log_softmax(logits, 1), F.log_softmax(fixed_logits, 1), reduction="sum", log_target=True) / logits.numel()
        )
        return entropy + change + divergence

    return [Row("promptsrc", "a CLIP: loss with regularizers, gradients", measure(loss, reference, pairs))]


def _stacked(tensors: Any) -> Any:
    return lambda read: torch.stack([read(tensor) for tensor in tensors])
