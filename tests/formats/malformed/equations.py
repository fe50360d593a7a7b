"""W' − W of one layer in each format's equation, written out in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.formats.malformed.bytes_read import Array, require

NONE = np.zeros(())
# its parts by name, alpha / r (None: to be told by `alpha`), the weight; W' − W


def scale_of(parts: dict[str, Array], rank: int, alpha: float | None = None) -> float:
    if alpha is None:
        given = parts.get("alpha", np.array(float(rank)))
        require(given.size == 1 and float(given.flatten()[0]) != 0, "alpha")
        alpha = float(given.flatten()[0])
    return alpha / rank


def lora(down: Array, up: Array, scale: Callable[[int], float], weight: Array, mid: Array | None = None) -> Array:
    require(down.ndim > 1 and up.ndim > 1 and len(down) == up.shape[1] > 0, "a pair")
    rank = len(down)
    if mid is not None:
        require(mid.ndim > 2 and mid.shape[:2] == (rank, rank) and down[0].size == down.shape[1], "a core")
        down = np.einsum("ab...,bi->ai...", mid, down.reshape(rank, -1))
    require(
        (len(up), *down.shape[1:]) == weight.shape or down[0].size == weight[0].size == down.shape[1] == weight.shape[1], "sides"
    )
    require(up[0, 0].size == 1 and len(up) == len(weight), "sides")
    return scale(rank) * (up.reshape(len(up), -1) @ down.reshape(rank, -1)).reshape(weight.shape)


def dora(change: Array, m: Array, weight: Array) -> Array:
    """m (d_out, 1, …) with the norm of each output's row, or m (1, d_in, …) with that of each input's column."""
    inputs = not (m.ndim and m.size == len(m) == len(weight))
    require(not inputs or (m.ndim > 1 and m.size == m.shape[1] == weight.shape[1]), "magnitudes")
    after = np.moveaxis(weight + change, 1, 0) if inputs else weight + change
    flat = after.reshape(len(after), -1)
    require(np.linalg.norm(flat, axis=1).all(), "magnitudes")
    turned = (m.reshape(-1, 1) * flat / np.linalg.norm(flat, axis=1, keepdims=True)).reshape(after.shape)
    return (np.moveaxis(turned, 0, 1) if inputs else turned) - weight


def sides(factor: Array, inner: tuple[int, ...] = ()) -> Array:
    """A factor of two dimensions, or of rows and `inner`; ones may follow."""
    found = factor
    while found.ndim > 2 and found.shape[-1] == 1:
        found = found[..., 0]
    while len(inner) > 1 and inner[-1] == 1:
        inner = inner[:-1]
    require(found.ndim == 2 or found.shape[1:] == inner, "sides")
    return found.reshape(len(found), -1) if found.ndim > 1 else found


def loha(parts: dict[str, Array], scale: Callable[[int], float], weight: Array) -> Array:
    products = []
    for i in "12":
        up, down, core = parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}")
        if core is None:
            up, down = sides(up), sides(down, weight.shape[1:])
            require(up.ndim == down.ndim == 2 and up.shape[1] == len(down), "factors")
            products.append(up @ down)
        else:
            up, down = sides(up), sides(down)
            require(core.ndim == weight.ndim and core.shape[:2] == (len(up), len(down)) and up.ndim == down.ndim == 2, "a core")
            products.append(np.einsum("pq...,po,qi->oi...", core, up, down))
    require(("hada_t1" in parts) == ("hada_t2" in parts), "cores")
    rank = len(parts["hada_w1_b"])
    require(rank == len(parts["hada_w2_b"]) and products[0].size == products[1].size == weight.size, "sides")
    require(all(len(p) == len(weight) for p in products), "sides")
    return scale(rank) * (products[0] * products[1]).reshape(weight.shape)


def lokr(parts: dict[str, Array], scale: Callable[[int | None], float], weight: Array) -> Array:
    factors, ranks = [], []
    for i in "12":
        whole, a, b = (parts.get(f"lokr_w{i}{end}", NONE) for end in ("", "_a", "_b"))
        core = parts.get("lokr_t2") if i == "2" else None
        require((whole is NONE) == (a is not NONE) == (b is not NONE), "one factor, or its two")
        if whole is not NONE:
            require(core is None, "a core")
            factors.append(sides(whole) if i == "1" else whole)
        elif core is not None:
            require(a.ndim == b.ndim == 2 and core.shape[:2] == (len(a), len(b)), "a core")
            factors.append(np.einsum("pq...,po,qi->oi...", core, a, b))
            ranks.append(len(b))
        else:
            a = sides(a)
            require(a.ndim == 2 and b.ndim > 1 and a.shape[1] == len(b), "a factor")
            factors.append((a @ b.reshape(len(b), -1)).reshape(len(a), *b.shape[1:]))
            ranks.append(len(b))
    require(len(set(ranks)) < 2, "two ranks")
    left, right = factors
    require(left.ndim == 2 and right.ndim > 1, "factors")
    inner = math.prod(weight.shape[2:])
    width = weight.shape[1] // left.shape[1]
    sides(right, (width, *weight.shape[2:]))
    require(right[0].size == width * inner and len(left) * len(right) == len(weight), "sides")
    right = right.reshape(len(right), width, *weight.shape[2:])
    full = np.kron(left.reshape(*left.shape, *(1,) * (right.ndim - 2)), right)
    return scale(ranks[0] if ranks else None) * full.reshape(weight.shape)


def cayley(q: Array) -> Array:
    """(I + Q)(I − Q)⁻¹."""
    return (np.eye(len(q)) + q) @ np.linalg.inv(np.eye(len(q)) - q)


def neumann(q: Array, count: int) -> Array:
    """peft's truncated series I + 2 Q + 2 Q² + …, the last power once; 2 terms are I + 2 Q, and 3 are as 4."""
    powers = [np.linalg.matrix_power(q, i) for i in range(max(4, count) if count > 2 else count)]
    factors = [1] + [2] * (len(powers) - 1)
    if count > 2:
        factors[-1] = 1
    return sum(f * p for f, p in zip(factors, powers, strict=True))


def skew(entries: Array, size: int) -> Array:
    q = np.zeros((size, size))
    q[np.triu_indices(size, 1)] = entries
    return q - q.T


def blocks(turns: list[Array]) -> Array:
    side = len(turns[0])
    whole = np.zeros((len(turns) * side,) * 2)
    for i, turn in enumerate(turns):
        whole[i * side : (i + 1) * side, i * side : (i + 1) * side] = turn
    return whole


def butterfly(given: Array) -> Array:
    """LyCORIS' product of components: those of a block in component i alternate between halves of 2^i half-blocks."""
    m, count, side, _ = given.shape
    whole = np.eye(count * side)
    for step in range(m):
        order = np.arange(count * side).reshape(-1, 2, 2**step * side // 2).swapaxes(1, 2).flatten()
        turn = np.zeros_like(whole)
        turn[np.ix_(order, order)] = blocks([cayley(b - b.T) for b in given[step]])
        whole = turn @ whole
    return whole


def turned(parts: dict[str, Array], weight: Array) -> Array:
    """LyCORIS' OFT, W' = D Rᵀ W, and BOFT, W' = D B_m ⋯ B_1 W; `alpha` · d_out is the largest norm of all Q together."""
    given, rows = parts["oft_blocks"], len(weight)
    require(given.ndim in (3, 4) and given.shape[-1] == given.shape[-2] and given.shape[-3] * given.shape[-1] == rows, "blocks")
    alpha, norm = parts.get("alpha", np.zeros(())), np.linalg.norm(given - given.swapaxes(-1, -2))
    require(alpha.size == 1 and alpha.flatten()[0] >= 0, "a constraint")
    longest = float(alpha.flatten()[0]) * rows
    given = given * (longest / norm) if 0 < longest < norm else given
    if given.ndim == 4:
        require(given.shape[-1] % 2 == 0 and rows % (2 ** (len(given) - 1) * given.shape[-1]) == 0, "a butterfly")
    turn = butterfly(given) if given.ndim == 4 else blocks([cayley(b - b.T) for b in given]).T
    after = (turn @ weight.reshape(rows, -1)).reshape(weight.shape)
    lengths = parts.get("rescale", np.ones(rows))
    require(lengths.size == rows, "rescale")
    return lengths.reshape(-1, *(1,) * (weight.ndim - 1)) * after - weight


def glora(parts: dict[str, Array], scale: Callable[[int], float], weight: Array) -> Array:
    a1, a2, b1, b2 = (sides(parts[f"{x}.weight"]) for x in ("a1", "a2", "b1", "b2"))
    width, rank = weight.shape[1], len(a2)
    right = (a1.shape, a2.shape, b1.shape) == ((width, rank), (rank, width), (len(weight), rank))
    require(right and len(b2) == rank and weight.ndim == 2 and b2.shape == (rank, width), "terms")
    return scale(rank) * (weight @ a1 @ a2 + b1 @ b2)


def ia3(parts: dict[str, Array], weight: Array) -> Array:
    w, flag = parts["weight"], parts["on_input"]
    require(flag.size == 1, "on_input")
    inputs = bool(flag.flatten()[0])
    require(w.size == weight.shape[1 if inputs else 0], "sides")
    return weight * (w.reshape(1, -1) if inputs else w.reshape(-1, 1)).reshape(
        *((1, -1) if inputs else (-1, 1)), *(1,) * (weight.ndim - 2)
    )


def changed(parts: dict[str, Array], weight: Array) -> Array:
    """One module in LyCORIS' layout."""
    ends = parts.keys()
    if "oft_blocks" in ends:
        require(ends <= {"oft_blocks", "rescale", "alpha"}, "other ends")
        return turned(parts, weight)
    scale = lambda rank: scale_of(parts, rank)  # noqa: E731
    if "on_input" in ends:
        require(ends == {"weight", "on_input"}, "other ends")
        return ia3(parts, weight)
    if any(end.startswith("hada_") for end in ends):
        names = {f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}
        require(ends <= names | {"alpha", "dora_scale"}, "other ends")
        change = loha(parts, scale, weight)
        return dora(change, parts["dora_scale"], weight) if "dora_scale" in ends else change
    if any(end.startswith("lokr_") for end in ends):
        names = {f"lokr_w{i}{end}" for i in "12" for end in ("", "_a", "_b")}
        require(ends <= names | {"lokr_t2", "alpha", "dora_scale"}, "other ends")
        change = lokr(parts, lambda rank: scale_of(parts, rank) if rank else 1.0, weight)
        return dora(change, parts["dora_scale"], weight) if "dora_scale" in ends else change
    if "a1.weight" in ends:
        require(ends <= {f"{x}.weight" for x in ("a1", "a2", "b1", "b2")} | {"alpha"}, "other ends")
        return glora(parts, scale, weight)
    known = {"lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "alpha"}
    require({"lora_down.weight", "lora_up.weight"} <= ends <= known, "no pair")
    change = lora(parts["lora_down.weight"], parts["lora_up.weight"], scale, weight, parts.get("lora_mid.weight"))
    return dora(change, parts["dora_scale"], weight) if "dora_scale" in ends else change
