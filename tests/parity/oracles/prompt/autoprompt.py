"""AutoPrompt beside its authors' search, exchange by exchange."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from tests.parity.clip import NAMES, TOKENIZER, encode_rows, perturbed_classifier, tokenize
from tests.parity.measure import Row, randn
from tests.parity.oracle import Repository, float64, options
from veneer.injection import attach
from veneer.training.objective.forward_passes import ForwardPasses

ORACLE = Repository("ucinlp/autoprompt", "d637675999adf057a581c3d1084d64f3a247fda5")
METHODS = ("autoprompt",)
WORDS, TOKENS, CANDIDATES, SEARCHES = "a photo of a", 4, 5, 12
LABELS = torch.arange(4) % len(NAMES)
SILENT = options(**dict.fromkeys(("info", "debug", "warning"), lambda *text: None))
START, END = TOKENIZER.sot_token_id, TOKENIZER.eot_token_id


def rows() -> list[Row]:
    """Share of searches whose candidates or tokens differ, with one batch for all of them."""
    ours, positions = _ours()
    theirs = _official(positions)
    tokens = [found for found, _ in theirs]
    assert len({tuple(found) for found in tokens}) > SEARCHES // 4  # the search moves
    different = sum(a != b for a, b in zip(ours, theirs, strict=True)) / SEARCHES
    text = (
        "losses decide, in the code accuracies if it has words of the classes; candidates are tried on the batch after that of "
        "their gradient; the token itself is no candidate, words with capital letters are"
    )
    return [Row("autoprompt", f"candidates and tokens of {SEARCHES} searches, a CLIP", different, deviations=text)]


def _images() -> Tensor:
    return randn(len(LABELS), 3, 32, 32)


def _ours() -> tuple[list[Any], list[int]]:
    """Tokens and candidates of each search, and the position of the candidates."""
    model: Any = perturbed_classifier()
    tuned = attach(model, "autoprompt", words=WORDS, candidates=CANDIDATES)
    adapter: Any = tuned.parts["head.prompts"][1]
    path: list[Any] = []
    passes, positions, step = ForwardPasses([tuned]), [], 0
    model.train()
    while len(path) < SEARCHES:
        output, _ = passes(step, lambda: model(_images()), lambda a, b: a, lambda out: cross_entropy(out, LABELS))
        cross_entropy(output, LABELS).backward()
        step += 1
        tuned.after_step(step, 10 * SEARCHES)
        adapter.context.grad = None
        if adapter.place >= 0:
            path.append((adapter.nearest()[0].tolist(), adapter.choices.tolist()))
            positions.append(int(adapter.place))
    return path, positions


class PromptModel(nn.Module):
    """Class logits at the last position of (M + 1) ids, whose first M are the prompt of all classes, as a model of masked words.

    `path`: the prompts of the passes with gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clip: Any = perturbed_classifier().clip
        self.table = self.clip.token_embedding.requires_grad_(True)
        self.base = options(embeddings=options(word_embeddings=self.table))
        self.path: list[list[int]] = []

    def forward(self, input_ids: Tensor, images: Tensor) -> tuple[Tensor]:
        if torch.is_grad_enabled():
            self.path.append(input_ids[0, :TOKENS].tolist())
        vectors = self.table(input_ids)[:, :TOKENS]
        ids = tokenize([f"{WORDS} {name}." for name in NAMES])
        rows = self.clip.token_embedding.weight[ids].expand(len(vectors), -1, -1, -1)
        prompt = vectors.unsqueeze(1).expand(-1, len(NAMES), -1, -1)
        rows = torch.cat([rows[:, :, :1], prompt, rows[:, :, 1 + TOKENS :]], 2).flatten(0, 1)
        weights = normalize(encode_rows(self.clip, rows, ids.repeat(len(vectors), 1)), dim=-1).unflatten(0, (-1, len(NAMES)))
        features = normalize(self.clip.encode_image(images), dim=-1)
        logits = self.clip.logit_scale.exp() * (weights @ features.unsqueeze(-1)).squeeze(-1)
        words = torch.full((len(images), TOKENS + 1, len(NAMES) + 1), -1e9)
        words[:, -1, 1:] = logits
        return (words,)


def _official(positions: list[int]) -> list[Any]:
    model, candidates, places = PromptModel(), [], iter(positions)
    last = torch.arange(TOKENS + 1) == TOKENS
    masks = {"trigger_mask": (~last).repeat(len(LABELS), 1), "predict_mask": last.repeat(len(LABELS), 1)}
    inputs = {"input_ids": torch.zeros(len(LABELS), TOKENS + 1, dtype=torch.int64), "images": _images(), **masks}
    utils = options(
        TriggerTemplatizer=lambda *a, **o: options(num_trigger_tokens=TOKENS),
        Collator=lambda **o: None,
        load_trigger_dataset=lambda *a, **o: [],
    )
    code = ORACLE.definitions(
        "autoprompt/create_trigger.py", replace={"'cuda' if torch.cuda.is_available() else 'cpu'": "'cpu'"}, utils=utils,
        argparse=None, Path=Path, time=time, random=options(seed=random.seed, randrange=lambda count: next(places)),
        logging=options(getLogger=lambda name: SILENT), tqdm=lambda items: items,
        DataLoader=lambda dataset, **o: [(inputs, 1 + LABELS.unsqueeze(1))], print=lambda *text: None,
    )  # fmt: skip
    tokenizer = options(
        convert_tokens_to_ids=lambda ids: ids, convert_ids_to_tokens=str, pad_token_id=0, mask_token_id=0,
        vocab_size=len(model.table.weight), all_special_ids=[START, END], get_vocab=lambda: {"start": START, "end": END},
    )  # fmt: skip
    code.load_pretrained = lambda name: (options(model_type="base"), model, tokenizer)
    code.isupper = lambda index, tokenizer: False
    attack = code.hotflip_attack

    def record(*arguments: Any, **options_: Any) -> Tensor:
        candidates.append(attack(*arguments, **options_))
        return candidates[-1]

    code.hotflip_attack = record
    names = ("seed", "model_name", "label_map", "template", "label_field", "tokenize_labels", "use_ctx", "perturbed", "limit")
    fields = {**dict.fromkeys((*names, "train", "dev", "bsz", "eval_size", "print_lama"), 0), "accumulation_steps": 1}
    with float64():
        code.run_model(
            options(
                **{**fields, "label_map": None}, initial_trigger=TOKENIZER.encode(WORDS), iters=SEARCHES,
                num_cand=CANDIDATES, filter=True,
            )
        )  # fmt: skip
    return [(found, ids.tolist()) for found, ids in zip(model.path, candidates, strict=True)]
