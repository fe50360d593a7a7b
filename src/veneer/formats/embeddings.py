"""`learned_embeds.safetensors`: token embeddings, as diffusers' `load_textual_inversion` and other tools read them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from veneer.injection import Attachment, LoadError, SaveError
from veneer.injection.sites import VocabularySite
from veneer.injection.towers import towers_of

from ._core.attach import AttachmentSpec, attach_all
from ._core.format import Format, LayerInfo, Options, pt_metadata
from ._core.token_embeddings import ENCODERS, UNNAMED, Rows, check_vectors, encoder_names, encoder_of_width, rows_by_encoder
from ._io.reader import File
from ._io.writer import write

TOKENS = "tokens"


class Embeddings(Format):
    """One text encoder: token -> vectors (n, width). Several: `clip_l`, `clip_g` (the first and the second CLIP), `t5`.

    diffusers loads the first form directly, `pipe.load_textual_inversion(file)`, and the second tensor by tensor,
    `pipe.load_textual_inversion(tensors["clip_g"], token=…, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)`.
    The tokens of the second form are in the metadata `tokens`, a JSON list; the vectors of several tokens are concatenated.

    A single tensor `emb_params` (sd-scripts) and images of A1111's web UI (`_io/image_embeddings.py`) are also read. If a file
    names no token, the token is `<name>`, after the file name, or the `token` argument.
    Source: diffusers 0.42 `loaders/textual_inversion.py` and its advanced SDXL and FLUX training scripts.
    """

    name: ClassVar[str] = "embeddings"
    file: ClassVar[str] = "learned_embeds.safetensors"
    order: ClassVar[int] = 2

    def reads(self, file: File) -> bool:
        if not file.shapes or len(file.shapes) > 64:
            return False
        rows = all(len(shape) in (1, 2) for shape in file.shapes.values())
        keyed_by_encoder = set(file.shapes) <= {*ENCODERS, UNNAMED}
        one_width = len({shape[-1:] for shape in file.shapes.values()}) == 1
        tokens = not any(key.endswith((".weight", ".bias")) or ":" in key for key in file.shapes)
        return rows and (keyed_by_encoder or (one_width and (tokens or TOKENS in file.metadata)))

    def layers(self, file: File) -> list[LayerInfo]:
        return [LayerInfo(key, "textual_inversion", values=math.prod(shape)) for key, shape in file.shapes.items()]

    def words(self, file: File) -> list[str]:
        saved = file.json(TOKENS) if file.shapes.keys() <= {*ENCODERS, UNNAMED} else list(file.shapes)
        return [word for word in saved if isinstance(word, str)] if isinstance(saved, list) else []

    def load(self, model: Any, file: File, options: Options) -> list[Attachment]:
        tensors = {key: t[None] if t.ndim == 1 else t for key, t in file.tensors(finite=options.strict).items()}
        order = file.json(TOKENS)
        if isinstance(order, list) and all(isinstance(t, str) for t in order) and sorted(order) == sorted(tensors):
            tensors = {token: tensors[token] for token in order}  # safetensors sorts them by name
        places = [s for tower in towers_of(model) for s in tower.sites if isinstance(s, VocabularySite)]
        encoder_keys = tensors.keys() & {*ENCODERS, UNNAMED}
        apart = len(encoder_keys) == len(tensors)
        if encoder_keys and not apart:
            others = ", ".join(key[:80] for key in tensors if key not in encoder_keys)
            both = f"vectors of encoders, {', '.join(sorted(encoder_keys))}, beside those of tokens, {others}"
            raise LoadError(f"{file.path}: {both}. Split the file.", file=file.path, given=tuple(tensors))
        tokens, note = _tokens(file, list(tensors), apart, options)
        rows = rows_by_encoder(file, tensors, places) if apart else _by_token(file, tensors, places)
        for site, vectors in rows:
            check_vectors(file, site, vectors, len(tokens))
        config = {"tokens": tokens if len(tokens) > 1 else tokens[0], "vectors": len(rows[0][1]) // len(tokens)}
        state = {f"{site.name}:vectors": vectors for site, vectors in rows}
        sites = [site.name for site, _ in rows]
        each = AttachmentSpec("textual_inversion", "textual_inversion", config, sites, state, notes=[note] if note else [])
        return attach_all(model, file, [each], options)

    def write_to(self, attachments: Sequence[Attachment], target: Path, provenance: Mapping[str, Any] | None) -> Path:
        if len(attachments) != 1 or attachments[0].method.name != "textual_inversion":
            got = ", ".join(f"'{a.name}' ({a.method.name})" for a in attachments) or "none"
            message = (
                f"{target}: the format holds one textual_inversion attachment; got {got}. Use Attachment.save (native format)."
            )
            given = tuple(a.method.name for a in attachments)
            raise SaveError(message, file=target, given=given, expected=("textual_inversion",))
        attachment = attachments[0]
        extra = [key for key in attachment.state_dict() if not key.endswith(":vectors")]
        if extra:
            message = f"{target}: the format cannot hold {', '.join(extra[:4])}. Save it with Attachment.save (native format)."
            raise SaveError(message, file=target, where=attachment.name, given=tuple(extra))
        method: Any = attachment.method
        names = encoder_names(attachment, target)
        vectors: dict[str, Tensor] = {names[site.name]: _rows(adapter) for site, adapter in attachment.parts.values()}
        if len(vectors) == 1:
            only = next(iter(vectors.values()))
            vectors = {t: only[i * method.vectors : (i + 1) * method.vectors] for i, t in enumerate(method.each)}
        tokens = json.dumps(list(method.each), ensure_ascii=False)
        return write(target, vectors, pt_metadata(provenance, {TOKENS: tokens}))


def _rows(adapter: Any) -> Tensor:
    rows: Tensor = adapter.vectors.detach()
    return rows


def _tokens(file: File, keys: list[str], apart: bool, options: Options) -> tuple[list[str], str | None]:
    """The tokens of a file, and a remark if the file does not name them."""
    saved = file.json(TOKENS) if apart else keys
    if options.token is not None:
        if isinstance(saved, list) and len(saved) > 1:
            message = f"{file.path}: has {len(saved)} tokens, {', '.join(map(str, saved))}; token= can rename only one."
            raise LoadError(message, file=file.path, option="token", given=tuple(map(str, saved)), expected=1)
        return [options.token], None
    if saved is None:
        token = f"<{file.path.stem.lower()}>"
        return [token], f"no token in the file: named '{token}' after it; pass token=… for another"
    if not isinstance(saved, list) or not saved or not all(isinstance(t, str) for t in saved):
        message = f"{file.path}: metadata 'tokens' is {saved!r}; expected a list of strings. Pass token=…."
        raise LoadError(message, file=file.path, where="tokens", option="token", given=saved)
    return saved, None


def _by_token(file: File, tensors: Mapping[str, Tensor], places: Sequence[VocabularySite]) -> Rows:
    counts = {len(t) for t in tensors.values()}
    if len(counts) > 1:
        found = ", ".join(f"{key} {len(t)}" for key, t in tensors.items())
        message = f"{file.path}: its tokens differ in the number of vectors ({found}). Save each to its own file."
        raise LoadError(message, file=file.path, given={key: len(t) for key, t in tensors.items()}, expected=1)
    rows = torch.cat(list(tensors.values()))
    return [(encoder_of_width(file, rows.shape[1], places), rows)]


save = Embeddings().save
