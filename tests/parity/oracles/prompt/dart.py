"""DART's trained template and label words beside its authors' rows of the embedding table."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from tests.parity.clip import TOKENIZER, encode_rows, perturbed_classifier, tokenize
from tests.parity.measure import Row, largest_difference, measure, randn
from tests.parity.oracle import Repository, options
from veneer.injection import attach

ORACLE = Repository("zjunlp/DART", "d418ded8bd548ef25f2d030990e707a497e93483")
METHODS = ("dart",)
WORDS, NAMES = "a photo of a", ["cat", "dog", "car"]


def rows() -> list[Row]:
    """Class weights with rows that are copies of other rows at first, and perturbed."""
    model: Any = perturbed_classifier(NAMES)
    ours: Any = attach(model, "dart", words=WORDS).parts["head.prompts"][1]
    tower = TextTower()
    reader = options(PATTERN=[WORDS, "[label]"], VERBALIZERS=NAMES)
    code = ORACLE.definitions("src/model.py", replace={"isinstance(tokenizer, GPT2Tokenizer)": "False"}, random=random)
    tokenizer = options(vocab_size=TOKENIZER.sot_token_id, encode=lambda text, add_special_tokens: TOKENIZER.encode(text))
    theirs = code.DiffPET(tokenizer, reader, tower, "cpu")
    tower.label_ids, table = theirs.label_ids, tower.table.weight
    copies = [(ours.context, table[theirs.pattern_ids]), (ours.labels, table[theirs.label_ids])]
    start = largest_difference(copies)
    with torch.no_grad():
        for ids in (theirs.pattern_ids, theirs.label_ids):
            table[ids] += 0.1 * randn(len(ids), table.shape[1])
    ids = tokenize([f"{WORDS} {name}." for name in NAMES]).long()
    position, flags = 1 + len(theirs.pattern_ids), torch.zeros_like(ids)
    flags[:, 1:position], flags[:, position] = 2, -1
    inputs = {"pet_flags": flags, "label_ids": torch.arange(len(NAMES)), "attention_mask": None, "token_type_ids": flags}

    def official() -> Tensor:
        batch: dict[str, Any] = {**inputs, "input_ids": ids.clone()}
        theirs.forward_step(batch)
        weights: Tensor = batch["pet_logits"]
        return weights

    pairs: Any = [
        (ours.context, lambda read: read(table)[theirs.pattern_ids]),
        (ours.labels, lambda read: read(table)[theirs.label_ids]),
    ]
    text = (
        "the words of classes are in the prompts, in the code in the output layer of a masked-word model, which is trained too; "
        "not compared: the fluency term, a distance of features here, a masked-word loss there"
    )
    difference = max(start, measure(lambda: ours.weights(randn(1, 32)), official, pairs))
    return [
        Row("dart", "rows of template and labels as initialized; class weights of a CLIP, gradients", difference, deviations=text)
    ]


class TextTower(nn.Module):
    """A CLIP's text tower as a language model: ids to class weights, with the trained rows at the labels, whose flag is −1."""

    label_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.clip: Any = perturbed_classifier(NAMES).clip
        self.table = self.clip.token_embedding.requires_grad_(True)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        table: nn.Module = self.table
        return table

    def forward(self, input_ids: Tensor, attention_mask: None, token_type_ids: Tensor) -> tuple[Tensor]:
        ids = input_ids.clone()
        ids[token_type_ids == -1] = self.label_ids.to(ids)
        return (normalize(encode_rows(self.clip, self.table(ids), input_ids), dim=-1),)
