"""Damaged, hostile and foreign files, failing disks: a clear error, nothing partially loaded or saved."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import veneer
from tests.formats.cases import fill, header, rewrite
from tests.injection.toy import Net, net
from tests.raising import raises
from veneer.formats import diffusers, embeddings, native, read
from veneer.injection import LoadError, SaveError, attach, hosts
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.testing.snapshot import assert_same, snapshot


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A file that loads."""
    tuned = fill(attach(net(), "lora", where="embed.token attn.{q,v}", rank=2, train="head"))
    return tuned.save(tmp_path / "good")


def refused(path: Path, model: Any = None, **data: Any) -> LoadError:
    """The error of a load with these attributes, after which the model is as before."""
    model = model or net()
    before = snapshot(model)
    with raises(LoadError, **data) as caught:
        veneer.load(model, path)
    assert_same(before, snapshot(model), "a failed load")
    error: LoadError = caught.value
    return error


def with_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The file with other tensors and the same header text."""
    tensors, metadata = load_file(path), header(path)["__metadata__"]
    change(tensors)
    save_file(tensors, path.with_name("changed.safetensors"), metadata)
    return path.with_name("changed.safetensors")


def with_veneer(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another JSON header of veneer's."""

    def all_of_it(found: dict[str, Any]) -> None:
        meta = json.loads(found["__metadata__"]["veneer"])
        change(meta)
        found["__metadata__"]["veneer"] = json.dumps(meta)

    return rewrite(path, all_of_it)


# what is no safetensors file


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["TRAP"],)


def test_pickles_under_a_safetensors_name_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "sprung"))
    for protocol in range(2, 6):
        (tmp_path / "p.safetensors").write_bytes(pickle.dumps({"a": Trap()}, protocol))
        refused(tmp_path / "p.safetensors", given="pickle", expected="safetensors")
    torch.save({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    refused(tmp_path / "t.safetensors", given="zip", expected="safetensors")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "data"),
    [
        (b"", {"given": "short"}),
        (b"\x10\x00\x00", {"given": "short"}),
        (b"<!DOCTYPE html><html>Not found</html>", {"given": "text"}),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", {"given": "git-lfs"}),
        ((5 * 10**9).to_bytes(8, "little") + b"{}" + bytes(100), {"given": 5 * 10**9, "expected": 102}),
        ((2**63).to_bytes(8, "little") + bytes(100), {"given": 2**63}),
        ((0).to_bytes(8, "little") + bytes(100), {"given": 0}),
        ((6).to_bytes(8, "little") + b"{{{{{{" + bytes(100), {"where": "header", "expected": "safetensors"}),
        ((8).to_bytes(8, "little") + b"[1,2,3] " + bytes(100), {"where": "header", "expected": "safetensors"}),
        ((10).to_bytes(8, "little") + b'{"a":null}' + bytes(100), {"where": "header", "expected": "safetensors"}),
        ((60_000).to_bytes(8, "little") + b"[" * 60_000, {"where": "header", "expected": "safetensors"}),
    ],
    ids=["empty", "short", "html", "lfs", "gigabytes", "exabytes", "zero", "broken", "list", "null", "deep"],
)
def test_something_else_under_the_name(tmp_path: Path, content: bytes, data: dict[str, Any]) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", file=str(tmp_path / "x.safetensors"), **data)


@pytest.mark.parametrize("shape", [[10**9, 10**3], [2**62, 2], [-1, 4]], ids=["terabytes", "overflow", "negative"])
def test_a_tensor_that_claims_more_than_is_there(good: Path, shape: list[int]) -> None:
    def grow(found: dict[str, Any]) -> None:
        found["head:bias"]["shape"] = shape

    refused(rewrite(good, grow), where="header", expected="safetensors")


def test_offsets_beyond_the_file(good: Path) -> None:
    def grow(found: dict[str, Any]) -> None:
        last = max((e for k, e in found.items() if k != "__metadata__"), key=lambda e: e["data_offsets"][1])
        last["data_offsets"][1] += 4 * 10**9
        last["shape"] = [10**9]

    error = refused(rewrite(good, grow), where="tensors")
    assert error.given < 10**5 < 4 * 10**9 <= error.expected


def test_every_truncation_is_detected(good: Path) -> None:
    data = good.read_bytes()
    for size in [*range(0, len(data), 97), len(data) - 1]:
        good.write_bytes(data[:size])
        error = refused(good, file=str(good))
        assert error.where in ("header", "tensors") or error.given == "short"


def test_nothing_at_the_path(tmp_path: Path) -> None:
    refused(tmp_path / "none", missing=("none", "none.safetensors"))
    refused(tmp_path, file=str(tmp_path), given=(), expected=1)
    for name in "ab":
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, file=str(tmp_path), given=("a.safetensors", "b.safetensors"), expected=1)


def test_weights_of_a_whole_model(tmp_path: Path) -> None:
    save_file({k: t.clone() for k, t in net().state_dict().items()}, tmp_path / "model.safetensors")
    error = refused(tmp_path / "model", given=tuple(read(tmp_path / "model").shapes))
    assert {"kohya", "lycoris", "native"} <= set(error.expected)


# what is a native file, but not of this model or not whole


def test_missing_unused_and_misshapen_tensors_are_named(good: Path) -> None:
    bad = with_tensors(
        good, lambda t: (t.pop("qkv.q:down"), t.update({"qkv.q:spare": torch.ones(1), "head:bias": torch.ones(9)}))
    )
    wrong = {"head:bias": ((9,), (3,))}
    refused(bad, missing=("qkv.q:down",), unused=("qkv.q:spare",), misshapen=wrong, file=str(bad))


def test_not_strict_loads_compatible_tensors_and_reports_the_rest(good: Path) -> None:
    bad = with_tensors(good, lambda t: (t.pop("qkv.q:down"), t.update({"head:bias": torch.ones(9)})))
    tuned = veneer.load(net(), bad, strict=False)
    report = tuned.loaded
    assert (report.missing, report.unused) == (("qkv.q:down",), ())
    assert report.misshapen == ("head:bias (9,) for (3,)",)
    assert torch.equal(tuned.state_dict()["qkv.q:up"], load_file(good)["qkv.q:up"])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(NAN, torch.float32), (INF, torch.float32), (NAN, torch.float16), (-INF, torch.bfloat16), (NAN, torch.float8_e4m3fn)],
)
def test_nonfinite_values(good: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        up = tensors["qkv.v:up"].clone()
        up[1, 1] = value
        tensors["qkv.v:up"] = up.to(dtype)

    refused(with_tensors(good, spoil), given=("qkv.v:up",), expected="finite")
    assert veneer.load(net(), with_tensors(good, spoil), strict=False).loaded.clean


def test_large_numbers_are_finite_though_their_sum_is_not(good: Path) -> None:
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors["qkv.v:up"] = torch.full_like(tensors["qkv.v:up"], 3e38)

    assert veneer.load(net(), with_tensors(good, grow)).loaded.clean


def other() -> Net:
    model = net()
    with torch.no_grad():
        model.qkv.weight[0, 0] *= -1
    return model


def test_another_base(good: Path) -> None:
    error = refused(good, other(), where="model", option="base")
    assert len(error.given) == len(error.expected) == 64
    assert error.given != error.expected
    tuned = veneer.load(other(), good, base="any")
    assert "not compared" in str(tuned.loaded)
    with raises(OptionError, method="load", option="base", given="other"):
        veneer.load(net(), good, base="other")  # type: ignore[arg-type]


def test_another_architecture(good: Path, tmp_path: Path) -> None:
    """Another class, and another size of the same."""
    pipe = tiny_pipeline("sd")
    path = fill(attach(pipe, "lora", where="attn.q", rank=2)).save(tmp_path / "sd")
    with raises(LoadError, where="model", expected="Net"):
        veneer.load(pipe, good)
    with raises(LoadError, where="unet", option="base") as caught:
        veneer.load(tiny_pipeline("sdxl"), path)
    assert (caught.value.given["cross_attention_dim"], caught.value.expected["cross_attention_dim"]) == (52, 24)
    with raises(LoadError, where="unet", expected="UNet2DConditionModel") as caught:
        veneer.load(tiny_pipeline("dit"), path)
    assert caught.value.given["transformer"] == "DiTTransformer2DModel"


@pytest.mark.parametrize(
    ("change", "data"),
    [
        (lambda m: m.update(version=2), {"where": "version", "given": 2, "expected": 1}),
        (lambda m: m.update(version="1"), {"where": "veneer", "expected": 1}),
        (lambda m: m.pop("base"), {"where": "veneer", "expected": 1}),
        (lambda m: m["attachments"].clear(), {"where": "veneer", "expected": 1}),
        (lambda m: m["attachments"][0].update(sites=[1]), {"where": "veneer", "expected": 1}),
        (lambda m: m["attachments"][0].pop("config"), {"where": "veneer", "expected": 1}),
        (lambda m: m["attachments"][0].update(method="lorra"), {"where": "lorra", "option": ""}),
        (lambda m: m["attachments"][0]["config"].update(spin=3), {"where": "lora", "option": "spin"}),
        (lambda m: m["attachments"][0]["config"].update(rank=0), {"where": "lora", "option": "rank", "given": 0}),
        (lambda m: m["attachments"][0].update(sites=["qkv.q", "gone"]), {"where": "lora", "missing": ("gone",)}),
        (
            lambda m: m["attachments"][0]["shared"].update({"qkv.k:down": "gone"}),
            {"where": "qkv.k:down", "missing": ("gone",)},
        ),
    ],
)
def test_inconsistent_headers(good: Path, change: Any, data: dict[str, Any]) -> None:
    refused(with_veneer(good, change), **data)


def test_a_second_attachment_without_tensors(good: Path) -> None:
    path = with_veneer(good, lambda m: m["attachments"].append({**m["attachments"][0], "name": "b"}))
    error = refused(path, file=str(path))
    assert error.missing or error.unused


def test_a_header_that_is_not_json(good: Path) -> None:
    refused(rewrite(good, lambda h: h["__metadata__"].update(veneer="{")), where="veneer", expected="JSON")


def test_the_second_of_two_attachments_fails(tmp_path: Path) -> None:
    """Nothing of the first remains: no hook, no token in the tokenizer."""
    pipe = tiny_pipeline("sd")
    both = [fill(attach(pipe, "textual_inversion", tokens="<toy>")), fill(attach(pipe, "lora", where="attn.q", rank=2))]
    path = native.save(both, tmp_path / "toy")
    bad = with_tensors(path, lambda t: t.pop(next(k for k in t if k.endswith(":up"))))
    fresh = tiny_pipeline("sd")
    with pytest.raises(LoadError) as caught:
        veneer.load(fresh, bad)
    assert [key.partition(".")[0] for key in caught.value.missing] == ["unet"]
    assert veneer.attachments(fresh) == []
    assert "<toy>" not in fresh.tokenizer.get_vocab()
    assert [a.name for a in veneer.load_all(fresh, path)] == ["textual_inversion", "lora"]
    with raises(LoadError, option="tokens", given="<toy>"):
        veneer.load(fresh, path)
    assert len(veneer.attachments(fresh)) == 2


# what cannot be written


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[Callable[[], Path]]]:
    """Each format's `save` onto an existing file."""
    pipe = tiny_pipeline("sd")
    words = fill(attach(pipe, "textual_inversion", tokens="<toy>"))
    lora = fill(attach(pipe, "lora", rank=8))
    targets = [tmp_path / f"{name}.safetensors" for name in ("native", "lora", "words")]
    for target in targets:
        target.write_bytes(b"the old file")
    yield [
        lambda: native.save([words, lora], targets[0]),
        lambda: diffusers.save(lora, targets[1]),
        lambda: embeddings.save(words, targets[2]),
    ]
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(targets, b"the old file")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(writers: list[Callable[[], Path]], monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    for save in writers:
        with raises(SaveError, given=errno.ENOSPC):
            save()


def test_a_write_that_ends_midway_leaves_the_old_file(writers: list[Callable[[], Path]]) -> None:
    """The system rejects every byte after the two-hundredth."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
    try:
        for save in writers:
            with raises(SaveError, given=errno.EFBIG):
                save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def test_weights_that_diverged_are_not_written(tmp_path: Path) -> None:
    tuned = fill(attach(net(), "lora", where="attn.q", rank=2))
    path = tuned.save(tmp_path / "toy")
    before = path.read_bytes()
    with torch.no_grad():
        next(tuned.parameters())[0, 0] = float("nan")
    with raises(SaveError, where="qkv.q:down", expected="finite"):
        tuned.save(tmp_path / "toy")
    assert path.read_bytes() == before


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    with pytest.raises(SaveError) as caught:
        attach(net(), "bitfit").save(tmp_path / "file" / "toy")
    assert caught.value.given in (errno.ENOTDIR, errno.EEXIST)


def test_weights_on_meta_have_no_values(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = hosts.get("clip_text")().tiny()["clip"]()
    with raises(SaveError, given="meta"):
        attach(model, "lora", where="attn.q").save(tmp_path / "toy")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_reading_name_the_file(tmp_path: Path) -> None:
    with raises(LoadError, file=str(tmp_path / "gone")):
        read(tmp_path / "gone")


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path) -> None:
    """The first eight bytes are the header's length; 1,408 is `80 05 …`, the mark of a pickle of protocol 5."""
    header = json.dumps({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(1408).encode()
    (tmp_path / "t.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert read(tmp_path / "t.safetensors").shapes == {"t": (1,)}
