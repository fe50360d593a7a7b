"""Adds new tokens to a transformers tokenizer, and removes them again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from veneer.injection.errors import OptionError

_USES = "_veneer_claims"
_PLACEHOLDER = "\ue000freed {}\ue000"  # private-use characters, which do not occur in prompts


def spellings(token: str, vectors: int) -> list[str]:
    """`<toy>`, `<toy>_1`, …: one token per vector. diffusers' `maybe_convert_prompt` expands the first to all of them."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def check_new_token(tokenizer: Any, token: str, vectors: int) -> None:
    """Checks that a token can be added.

    Raises:
        ValueError: the tokenizer has it, or has a token that would conflict with its vectors when prompts are expanded.
    """
    if not token or token.split() != [token]:
        raise OptionError(
            f"token {token!r} is empty or contains white space; choose one like '<toy>'", option="tokens", given=token
        )
    known = tokenizer.get_vocab()
    ids = tokenizer.encode(token, add_special_tokens=False)
    existing = [t for t in spellings(token, vectors + 1) if t in known]
    if not existing and len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        existing = [tokenizer.convert_ids_to_tokens(ids)[0]]
    stem, _, number = token.rpartition("_")
    if number.isdecimal() and stem in tokenizer.added_tokens_encoder:
        existing = [*existing, stem]
    if existing:
        message = f"the tokenizer already has {existing[0]!r}, so {token!r} cannot be a new token; choose another"
        raise OptionError(message, option="tokens", where=existing[0], given=token)


def add_tokens(tokenizer: Any, names: Sequence[str]) -> list[int]:
    """Adds tokens and returns their ids. Towers that share a tokenizer share the tokens; the last `remove_tokens` removes them.

    Raises:
        ValueError: the tokenizer does not keep a token whole; nothing has been added then.
    """
    claims: dict[tuple[str, ...], int] = tokenizer.__dict__.get(_USES, {})
    key = tuple(names)
    if key not in claims:
        tokenizer.add_tokens(list(names))
        bad = [n for n in names if not _is_kept_whole(tokenizer, n, alone=len(names) == 1)]
        if bad:
            _remove(tokenizer, names)
            message = f"the tokenizer does not keep {bad[0]!r} whole; choose a lowercase token, like '<toy>'"
            raise OptionError(message, option="tokens", given=bad[0], expected="lower case")
    tokenizer.__dict__[_USES] = {**claims, key: claims.get(key, 0) + 1}
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(names))
    return ids


def remove_tokens(tokenizer: Any, names: Sequence[str]) -> None:
    """Undoes one `add_tokens`. Ids of tokens that were added later are unchanged."""
    claims: dict[tuple[str, ...], int] = tokenizer.__dict__[_USES]
    key = tuple(names)
    claims[key] -= 1
    if not claims[key]:
        del claims[key]
        _remove(tokenizer, names)
    if not claims:
        del tokenizer.__dict__[_USES]


def _is_kept_whole(tokenizer: Any, name: str, alone: bool) -> bool:
    """True if encoding the token gives its id and, where prompts are expanded by name, tokenizing gives the name itself."""
    whole = tokenizer.encode(name, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(name)]
    return whole and (alone or tokenizer.tokenize(name) == [name])


def _remove(tokenizer: Any, names: Sequence[str]) -> None:
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is None:
        _remove_slow(tokenizer, names)
        return
    state = json.loads(backend.to_str())
    kept = _without({t["id"]: t["content"] for t in state["added_tokens"]}, names)
    state["added_tokens"] = [{**t, "content": kept[t["id"]]} for t in state["added_tokens"] if t["id"] in kept]
    backend.__setstate__(json.dumps(state, ensure_ascii=False).encode())


def _remove_slow(tokenizer: Any, names: Sequence[str]) -> None:
    """For tokenizers written in Python, which keep added tokens in dictionaries and a trie."""
    added = dict(tokenizer._added_tokens_decoder)
    kept = _without({i: str(t) for i, t in added.items()}, names)
    for i, token in added.items():
        if i not in kept:
            del tokenizer._added_tokens_decoder[i]
        elif kept[i] != str(token):
            tokenizer._added_tokens_decoder[i] = type(token)(kept[i])
    tokenizer._added_tokens_encoder.clear()
    tokenizer._added_tokens_encoder.update({str(t): i for i, t in tokenizer._added_tokens_decoder.items()})
    tokenizer.tokens_trie = type(tokenizer.tokens_trie)()
    tokenizer._update_trie()
    tokenizer._update_total_vocab_size()


def _without(added: dict[int, str], names: Sequence[str]) -> dict[int, str]:
    """Added tokens by id without `names`. Below a remaining token a placeholder keeps the position, as ids have no gaps."""
    remaining = {i: (_PLACEHOLDER.format(i) if t in names else t) for i, t in sorted(added.items())}
    while remaining and remaining[max(remaining)] == _PLACEHOLDER.format(max(remaining)):
        del remaining[max(remaining)]
    return remaining
