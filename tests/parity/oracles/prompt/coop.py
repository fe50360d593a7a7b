"""CoOp and CoCoOp beside their authors' trainers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from tests.parity.clip import CLIP, HALF, NAMES, TOKENIZER, classifier, clip
from tests.parity.measure import Row, measure, perturb, randn
from tests.parity.models import link
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("KaiyangZhou/CoOp", "ff61507c790454bce7c5052c3ac39e60772f1f89")
METHODS = ("cocoop", "coop")
COMPARED = "a CLIP: logits, gradients"


def rows() -> list[Row]:
    """CoOp with its three positions, and CoCoOp."""
    positions = max(_coop(position, by_class) for position in ("end", "middle", "front") for by_class in (False, True))
    return [
        Row("coop", f"positions, one context or one for each class; {COMPARED}", positions),
        Row("cocoop", COMPARED, _cocoop()),
    ]


def _trainer(path: str, **config: Any) -> tuple[Any, Any]:
    (base,) = clip(ORACLE)
    base.requires_grad_(False)
    namespace = {"clip": CLIP, "_tokenizer": TOKENIZER, "OrderedDict": OrderedDict, "print": lambda *text: None}
    text = ORACLE.definitions(path, "TextEncoder", **namespace)
    learner = ORACLE.definitions(
        path, "PromptLearner", replace={".half()": HALF[".half()"]} if "cocoop" in path else None, **namespace
    )
    code = ORACLE.definitions(path, "CustomCLIP", TextEncoder=text.TextEncoder, PromptLearner=learner.PromptLearner, **namespace)
    name = "COCOOP" if "cocoop" in path else "COOP"
    theirs = code.CustomCLIP(
        options(TRAINER=options(**{name: options(**config)}), INPUT=options(SIZE=(32, 32))), NAMES, base
    ).double()
    perturb(theirs.prompt_learner, 0.05)
    return theirs, classifier(base)


def _coop(position: str, by_class: bool) -> float:
    theirs, model = _trainer("trainers/coop.py", N_CTX=3, CTX_INIT="", CSC=by_class, CLASS_TOKEN_POSITION=position)
    ours: Any = attach(model, "coop", tokens=3, position=position, by_class=by_class).parts["head.prompts"][1]
    pairs = [(ours.context, link(theirs.prompt_learner.ctx))]
    return measure(lambda: model(randn(3, 3, 32, 32)), lambda: theirs(randn(3, 3, 32, 32)), pairs)


def _cocoop() -> float:
    theirs, model = _trainer("trainers/cocoop.py", N_CTX=4, CTX_INIT="a photo of a", PREC="fp32")
    theirs.eval()
    ours: Any = attach(model, "cocoop").parts["head.prompts"][1]
    net = theirs.prompt_learner.meta_net
    net.linear1.bias.data.add_(0.5)  # its two hidden units are above zero
    pairs: Any = [(ours.context, link(theirs.prompt_learner.ctx))]
    mine = [p for name, p in ours.named_parameters() if name != "context"]
    pairs += [(p, link(other)) for p, other in zip(mine, net.parameters(), strict=True)]
    return measure(lambda: model(randn(3, 3, 32, 32)), lambda: theirs(randn(3, 3, 32, 32)), pairs)
