"""Mutations of the tensors of a file: their names, their set and their values."""

from __future__ import annotations

import json
import math
import struct
from random import Random

from tests.formats.malformed.draft import Draft, mutation

NAMES = [
    "", " ", ".", "..", ":", "a\x00b", "\ud800", "x" * 10**5, "é" * 300, "__metadata__ ", "\n", "🦆", "../../x", "name:*", "*",
    "%s{0}", "lora", "alpha", ".alpha", ".lora_A.weight", "unet:" + "9" * 5000 + ":up", "text_encoder:٣:up", "base_model.",
    "clip_l", "bundle_emb.x.clip_l", "lycoris_", "lora_te_",
]  # fmt: skip


@mutation("tensors")
def another_name(draft: Draft, rng: Random) -> None:
    name = draft.pick(rng)
    draft.entries[rng.choice(NAMES)] = draft.entries.pop(name)


@mutation("tensors")
def one_more_tensor(draft: Draft, rng: Random) -> None:
    name = rng.choice([*NAMES, draft.pick(rng) + rng.choice([".x", ".weight", "_2", ".alpha"])])
    if name not in draft.entries:
        shape = rng.choice([[], [1], [2, 8], [8, 2]])
        draft.put(name, "F32", shape, struct.pack("<f", 0.5) * math.prod(shape))


@mutation("tensors")
def names_not_in_utf_8(draft: Draft, rng: Random) -> bytes:
    name = draft.pick(rng)
    text = json.dumps(draft.header()).encode()
    return draft.data(
        text.replace(name.encode(), name.encode()[:-1] + rng.choice([b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x00"]))
    )


@mutation("tensors")
def another_letter_in_a_name(draft: Draft, rng: Random) -> None:
    name = draft.pick(rng)
    at = rng.randrange(len(name))
    entry = draft.entries.pop(name)
    draft.entries[name[:at] + rng.choice("0123456789._abAB:") + name[at + 1 :]] = entry


@mutation("tensors")
def tensor_lost(draft: Draft, rng: Random) -> None:
    for _ in range(rng.choice([1, 1, 2])):
        if len(draft.entries) > 1:
            draft.take(draft.pick(rng))


@mutation("tensors")
def only_a_few_left(draft: Draft, rng: Random) -> None:
    for name in list(draft.entries):
        if rng.random() < 0.7:
            draft.take(name)


@mutation("tensors")
def two_names_changed(draft: Draft, rng: Random) -> None:
    """Swap the values of two tensors."""
    one, other = draft.pick(rng), draft.pick(rng)
    draft.entries[one], draft.entries[other] = draft.entries[other], draft.entries[one]


@mutation("tensors")
def same_tensor_under_another_name(draft: Draft, rng: Random) -> None:
    """Add or replace a name by that of another format, or by a second spelling."""
    name = draft.pick(rng)
    spelt = [
        name.replace("lora_down", "lora_A"), name.replace("lora_up", "lora_B"), name.replace("lora_A", "lora_down"),
        name.replace("text_model.", ""), name.replace("text_encoder.", ""), name.replace("lora_te_", "lora_te1_"),
        name.replace(".weight", ""), name.replace(".weight", ".default.weight"), f"{name}.weight", f"text_encoder.{name}",
        f"base_model.model.{name}", name.removeprefix("base_model.model."), name.replace("diffusion_model.", ""),
        f"diffusion_model.{name}", name.replace("lycoris_", "lora_unet_"), f"unet.{name}", name.replace(":", "/"), f"lora/{name}",
        name.replace("base_model.model.", "base_model.model.text_model."), name.replace("oft_R.weight", "oft_R"),
        name.replace("_magnitude_vector", "_magnitude_vector.weight"), name.replace(":0:", ":00:"),
        name.replace("bundle_emb.", ""), name.upper(), f"control_model.{name}", name.removeprefix("control_model."),
        f"adapter.{name}", name.removeprefix("adapter."), name.replace(".resnets.", ".body."),
        name.replace("to_k_ip", "to_v_ip"), name.replace(".1.", ".01."), name.replace("0", "٠"),
    ]  # fmt: skip
    other = rng.choice([n for n in spelt if n not in draft.entries] or [name + "_"])
    entry = draft.entries[name]
    data = draft.body[slice(*entry["data_offsets"])] if rng.random() < 0.5 else draft.take(name)
    draft.put(other, entry["dtype"], entry["shape"], data)


@mutation("tensors")
def keys_of_another_format(draft: Draft, rng: Random) -> None:
    more = [
        ("lora_unet_x.lora_down.weight", [2, 8]), ("unet.x.lora_A.weight", [2, 8]), ("lora_transformer_x.alpha", []),
        ("double_blocks.0.img_attn.proj.lora_A.weight", [2, 8]), ("base_model.model.fc.lora_A.weight", [2, 6]),
        ("lycoris_fc.alpha", []), ("lycoris_fc.hada_w1_a", [8, 2]), ("lycoris_fc.diff", [8, 6]),
        ("transformer.x.lokr_w1", [2, 2]),
        ("text_encoder:0:up", [8, 2]), ("<x>", [8]), ("emb_params", [1, 8]), ("fc:down", [2, 6]), ("clip_g", [1, 8]),
        ("bundle_emb.cat.clip_l", [1, 8]), ("bundle_emb.cat.clip_l_out", [1, 8]), ("lora_te_x.dora_scale", [8, 1]),
        ("input_hint_block.0.weight", [4, 3, 3, 3]), ("controlnet_cond_embedding.conv_in.weight", [4, 3, 3, 3]),
        ("adapter.body.0.resnets.0.block1.weight", [8, 8, 1, 1]), ("body.0.block1.weight", [8, 8, 1, 1]),
        ("ip_adapter.1.to_k_ip.weight", [8, 24]), ("image_proj.latents", [1, 4, 8]), ("image_proj.proj.weight", [96, 12]),
        ("down_res.0.x", [1]), ("mid_convs.0.x", [1]), ("time_embedding.x", [1]), ("lora_controlnet", []),
        ("body.0.out_conv.weight", [8]),
    ]  # fmt: skip
    for name, shape in rng.sample(more, rng.choice([1, 2, 4])):
        if name not in draft.entries:
            size = math.prod(shape)
            draft.put(name, "F32", shape, struct.pack(f"<{size}f", *(rng.random() for _ in range(size))))


@mutation("tensors")
def another_rank(draft: Draft, rng: Random) -> None:
    """Add or remove a row or column, with its bytes."""
    name = draft.pick(rng)
    entry = dict(draft.entries[name])
    if entry["shape"]:
        draft.take(name)
        shape = list(entry["shape"])
        side = rng.randrange(len(shape))
        shape[side] = max(0, shape[side] + rng.choice([-1, 1, 2, shape[side]]))
        width = 4 if entry["dtype"] == "F32" else 8
        draft.put(name, entry["dtype"], shape, struct.pack(f"<{math.prod(shape)}f", *[0.25] * math.prod(shape)) * (width // 4))


@mutation("tensors")
def nothing_in_it(draft: Draft, rng: Random) -> None:
    name = draft.pick(rng)
    draft.take(name)
    draft.put(name, "F32", rng.choice([[0], [0, 8], [2, 0], [0, 0], [10**9, 0], [0, 2**40], [2**31, 2**31, 0]]), b"")


@mutation("tensors")
def large_for_real(draft: Draft, rng: Random) -> None:
    """A tensor that is as large as claimed, of a wrong shape."""
    name = draft.pick(rng)
    draft.take(name)
    shape = rng.choice([[1000, 1000], [10**6], [4, 2, 10**5], [1, 1, 1, 10**5]])
    draft.put(name, "F32", shape, bytes(4 * math.prod(shape)))


# values


SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-45, 1e-38, 1e30, -3e38, 1.0, -1.0, 1e-8, 65504.0]


@mutation("tensors")
def a_special_value(draft: Draft, rng: Random) -> None:
    """NaN, infinity, zero, very small or very large values, in one element or all."""
    start, stop = draft.entries[draft.pick(rng, "F32")]["data_offsets"]
    value = struct.pack("<f", rng.choice(SPECIAL))
    at = start if rng.random() < 0.3 else rng.randrange(start, stop, 4)
    count = (stop - at) // 4 if rng.random() < 0.3 else 1
    draft.body = draft.body[:at] + value * count + draft.body[at + 4 * count :]


@mutation("tensors")
def an_alpha(draft: Draft, rng: Random) -> None:
    """Change the value, dtype or shape of an alpha, or add one."""
    ends = (".lora_down.weight", ".lora_A.weight", ".hada_w1_a", ".a1.weight", ".oft_blocks", ".lokr_w1")
    layers = [name.removesuffix(end) for name in draft.entries for end in ends if name.endswith(end)]
    name = rng.choice([n for n in draft.entries if n.endswith(".alpha")] or [f"{layer}.alpha" for layer in layers] or ["x.alpha"])
    if name in draft.entries:
        draft.take(name)
    value, shape = rng.choice([*SPECIAL, 2.0, 2.0, 4.0, -2.0]), rng.choice([[], [], [1], [1, 1], [2]])
    dtype, data = rng.choice(
        [("F32", struct.pack("<f", value)), ("F64", struct.pack("<d", value)), ("F16", b"\x00\x40"), ("I64", b"\x07" + bytes(7))]
    )
    draft.put(name, dtype, shape, data * math.prod(shape))


@mutation("tensors")
def other_values(draft: Draft, rng: Random) -> None:
    """Other valid values."""
    start, stop = draft.entries[draft.pick(rng, "F32")]["data_offsets"]
    values = struct.pack(f"<{(stop - start) // 4}f", *(rng.gauss(0, 0.5) for _ in range((stop - start) // 4)))
    draft.body = draft.body[:start] + values + draft.body[stop:]


@mutation("tensors")
def as_another_dtype(draft: Draft, rng: Random) -> None:
    """The same values in float64 or half precision, or too large for float32."""
    name = draft.pick(rng, "F32")
    entry = dict(draft.entries[name])
    data = draft.take(name)
    values = list(struct.unpack(f"<{len(data) // 4}f", data))
    if rng.random() < 0.3 and values:
        values[rng.randrange(len(values))] = rng.choice([1e300, -1e39, 1e-300])
    code, dtype = rng.choice([("d", "F64"), ("d", "F64"), ("e", "F16"), ("f", "F32")])
    limit = {"d": math.inf, "e": 65000.0, "f": 3.4e38}[code]
    draft.put(name, dtype, entry["shape"], struct.pack(f"<{len(values)}{code}", *(v if abs(v) < limit else 1.0 for v in values)))
