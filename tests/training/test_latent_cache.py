"""The latent cache never returns stale, corrupt or incomplete entries, whatever the disk or another process does."""

import errno
import os
import time
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.raising import raises, warns
from veneer.injection.errors import OptionError
from veneer.training.data import latent_cache as module
from veneer.training.data.latent_cache import Cache, CacheWarning, Memory, cache_key, encoder_digest, why_not_cached

KEY = cache_key("picture", 1)


def value(seed=0):
    draws = torch.Generator().manual_seed(seed)
    return {
        "mean": torch.randn(4, 8, 8, generator=draws).half(),
        "ids": torch.arange(7),
        "scale": torch.tensor(0.5, dtype=torch.bfloat16),
        "none": torch.zeros(0, 3),
    }


def same(one, other):
    return one.keys() == other.keys() and all(one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one)


def never():
    raise AssertionError("computed, though it is there")


@pytest.fixture(params=["memory", "disk"])
def cache(request, tmp_path):
    return Cache(tmp_path / "deep" / "cache" if request.param == "disk" else None)


def test_computed_once(cache):
    first = cache.get(KEY, value)
    assert same(first, value())
    assert same(cache.get(KEY, never), first)
    assert (cache.hits, cache.misses) == (1, 1)
    other = cache.get(cache_key("picture", 2), lambda: value(2))
    assert same(other, value(2))
    assert not same(other, first)


def test_changes_of_a_returned_value_do_not_affect_the_cache(cache):
    given = value()
    cache.get(KEY, lambda: given)["mean"].zero_()
    given["mean"].fill_(7)
    assert same(cache.get(KEY, never), value())


def test_values_leave_the_graph_and_become_dense(cache):
    weight = torch.ones(2, 3, requires_grad=True)
    got = cache.get(KEY, lambda: {"x": (weight * 2).T})["x"]
    assert not got.requires_grad
    assert got.is_contiguous()
    assert torch.equal(got, torch.full((3, 2), 2.0))


def test_another_run_reads_it_from_disk(tmp_path):
    Cache(tmp_path).get(KEY, value)
    again = Cache(tmp_path)
    assert same(again.get(KEY, never), value())
    assert (again.hits, again.misses) == (1, 0)
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.safetensors"], "something else was left in the folder"


def test_small_memory_still_gives_right_values(tmp_path):
    cache = Cache(tmp_path, memory=600)
    keys = [cache_key(i) for i in range(5)]
    for _ in range(2):
        for i, key in enumerate(keys):
            assert same(cache.get(key, lambda i=i: value(i)), value(i))
    assert (cache.hits, cache.misses) == (5, 5)


@pytest.mark.parametrize("damage", ["empty", "short", "header", "bit", "text", "other"])
def test_a_corrupt_entry_is_recomputed(tmp_path, damage):
    Cache(tmp_path).get(KEY, value)
    path = tmp_path / f"{KEY}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "other":  # a good file of another key under this name
        Cache(tmp_path).get(cache_key("other"), lambda: value(9))
        data = bytearray((tmp_path / f"{cache_key('other')}.safetensors").read_bytes())
    elif damage == "bit":
        data[-20] ^= 1
    elif damage == "header":
        data[:8] = (2**40).to_bytes(8, "little")
    else:
        data = {"empty": bytearray(), "short": data[:-9], "text": bytearray(b"not this at all")}[damage]
    path.write_bytes(data)
    with warns(CacheWarning, file=path):
        assert same(Cache(tmp_path).get(KEY, value), value())
    assert same(Cache(tmp_path).get(KEY, never), value())


def test_a_file_with_another_key_is_recomputed(tmp_path):
    save_file({"mean": torch.zeros(2)}, tmp_path / f"{KEY}.safetensors")
    with warns(CacheWarning, file=tmp_path / f"{KEY}.safetensors", given="mismatch"):
        assert same(Cache(tmp_path).get(KEY, value), value())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_costs_only_the_disk(tmp_path, monkeypatch, number, call):
    cache = Cache(tmp_path)
    cache.get(KEY, value)

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, full)
    with warns(CacheWarning, file=tmp_path, given=number):
        assert same(cache.get(cache_key(2), lambda: value(2)), value(2))
    assert same(cache.get(cache_key(3), lambda: value(3)), value(3)), "one warning is enough"
    assert same(cache.get(cache_key(2), never), value(2))
    assert same(cache.get(KEY, never), value())
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.safetensors"], "a half-written file was left"


def test_a_really_full_disk(tmp_path):
    """`/dev/full` answers every write with ENOSPC, as a full disk does."""
    with raises(OSError, errno=errno.ENOSPC), open("/dev/full", "wb", buffering=0) as device:
        device.write(b"x")
    cache = Cache(tmp_path)
    original = os.fdopen

    def onto_full(handle, mode):
        os.close(handle)
        return original(os.open("/dev/full", os.O_WRONLY), mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fdopen", onto_full)
        with warns(CacheWarning, file=tmp_path, given=errno.ENOSPC):
            assert same(cache.get(KEY, value), value())
    assert list(tmp_path.iterdir()) == []
    assert same(cache.get(KEY, never), value())


def test_a_folder_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    with warns(CacheWarning, file=tmp_path / "file" / "cache"):
        cache = Cache(tmp_path / "file" / "cache")
    assert same(cache.get(KEY, value), value())
    assert same(cache.get(KEY, never), value())


def test_leftovers_of_killed_writers_go_but_not_those_of_living_ones(tmp_path):
    old, new = tmp_path / f".{KEY}.old.tmp", tmp_path / f".{KEY}.new.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    Cache(tmp_path)
    assert (old.exists(), new.exists()) == (False, True)


def test_values_that_are_not_finite_are_returned_but_not_cached(tmp_path):
    cache = Cache(tmp_path)
    with warns(CacheWarning, where=KEY, given=("mean",)):
        assert cache.get(KEY, lambda: {"mean": torch.tensor([1.0, float("nan")])})["mean"].isnan().any()
    assert same(cache.get(KEY, value), value())


def test_a_failure_while_computing_leaves_nothing(tmp_path):
    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Cache(tmp_path).get(KEY, fails)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "x" * 40, KEY + "\n", KEY.upper()])
def test_only_keys_are_names_of_files(tmp_path, key):
    with raises(OptionError, option="key", given=key):
        Cache(tmp_path).get(key, value)


def test_writers_at_once_never_show_a_torn_file(tmp_path):
    """Only the folder is shared, so threads are equivalent to processes."""
    writers = [Thread(target=lambda: [module._write(tmp_path, KEY, value()) for _ in range(40)]) for _ in range(3)]
    for writer in writers:
        writer.start()
    read = 0
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / f"{KEY}.safetensors").exists():
            assert same(Cache(tmp_path).get(KEY, never), value())
            read += 1
    assert read > 0
    assert [path.name for path in tmp_path.iterdir()] == [f"{KEY}.safetensors"]


def test_keys_are_unambiguous():
    parts = [
        (1, 23),
        (12, 3),
        ("1", 23),
        (1.0, 23),
        (1, 23, ""),
        (torch.float16,),
        (torch.bfloat16,),
        ("torch.float16",),
        (True,),
        (1,),
    ]
    assert len({cache_key(*each) for each in parts}) == len(parts)
    assert cache_key("picture", 1) == "0e190c8c71ee032a3a6cc57796e3e3213e78163b"


def encoder(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 60), nn.BatchNorm1d(60), nn.Linear(60, 60)).eval().requires_grad_(False)


def test_digest_is_of_content_not_of_the_object():
    assert encoder_digest(encoder()) == encoder_digest(encoder())
    assert encoder_digest(encoder(0)) != encoder_digest(encoder(1))


class Other(nn.Sequential):
    pass


def _step(model):
    for parameter in model.parameters():
        parameter.data.add_(1e-3)  # bypasses the version counter


CHANGES = {
    "one weight": lambda m: m[2].weight[3, 3].add_(1e-6),
    "a buffer": lambda m: m[1].running_mean.add_(1e-3),
    "past the version counter": _step,
    "another tensor": lambda m: setattr(m[2].weight, "data", m[2].weight.data + 1),
    "half precision": lambda m: m.half(),
    "a new child": lambda m: m.add_module("extra", nn.Linear(60, 2).requires_grad_(False)),
    "the configuration": lambda m: setattr(m, "config", {"scaling_factor": 0.18}),
    "loaded weights": lambda m: m.load_state_dict(encoder(5).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_an_encoder_changes_its_digest(change):
    """Also after the digest is cached: a stale digest would return stale latents."""
    model = encoder()
    before = encoder_digest(model)
    assert encoder_digest(model) == before
    CHANGES[change](model)
    assert encoder_digest(model) != before


def test_names_of_places_do_not_count_but_settings_and_class_do():
    one, two, three, other = encoder(), encoder(), encoder(), Other(*encoder())
    one.config = {"_name_or_path": "/here", "scaling_factor": 0.18}
    two.config = {"_name_or_path": "/there", "scaling_factor": 0.18}
    three.config = {"_name_or_path": "/here", "scaling_factor": 0.13}
    assert encoder_digest(one) == encoder_digest(two) != encoder_digest(three)
    assert encoder_digest(other) != encoder_digest(encoder())


def test_a_module_that_trains_is_never_remembered():
    model = encoder().requires_grad_(True)
    before = encoder_digest(model)
    model[2].weight.data[3, 4] += 1e-6
    assert encoder_digest(model) != before


def test_a_digest_is_remembered(monkeypatch):
    model, counted = encoder(), []
    original = module._content
    monkeypatch.setattr(module, "_content", lambda tensors: counted.append(1) or original(tensors))
    assert len({encoder_digest(model) for _ in range(3)}) == 1
    assert len(counted) == 1


def test_big_tensors_hash_the_same_with_and_without_threads():
    big = {f"w{i}": torch.full((600, 600), float(i)) for i in range(4)}
    threaded = module._content(big)
    assert threaded == cache_key(*map(module._fold, sorted(big.items())))


def test_dtypes_and_shapes_of_all_kinds_are_hashed():
    kinds = [torch.zeros(4, dtype=each) for each in (torch.float32, torch.int32, torch.bfloat16, torch.bool, torch.float8_e4m3fn)]
    kinds += [torch.zeros(2, 2), torch.zeros(()), torch.zeros(0)]
    assert len({module._content({"x": each}) for each in kinds}) == len(kinds)


def test_weights_that_are_not_there_cannot_be_hashed():
    with raises(OptionError, where="0.bias", given="meta"):
        encoder_digest(encoder().to("meta"))


def test_inference_tensors_are_hashed():
    with torch.inference_mode():
        model = encoder()
    assert encoder_digest(model) == encoder_digest(encoder())


def test_a_real_encoder_says_whether_it_may_be_cached():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 20}
    tower = CLIPTextModel(CLIPTextConfig(**sizes, attention_dropout=0.1)).eval().requires_grad_(False)
    assert why_not_cached(tower) is None
    digest = encoder_digest(tower)
    tower.get_input_embeddings().weight.requires_grad_(True)
    assert "CLIPTextModel has trainable parameters" in why_not_cached(tower)
    assert "embedding.weight" in why_not_cached(tower)
    tower.requires_grad_(False)
    assert encoder_digest(tower) == digest


def test_dropout_forbids_caching():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).requires_grad_(False)
    assert "dropout at 1; call eval" in why_not_cached(model)
    assert why_not_cached(model.eval()) is None
    assert why_not_cached(nn.Sequential(nn.Dropout(0.0))) is None


def test_memory_forgets_the_longest_unused():
    memory = Memory(30)
    for name in "abc":
        memory.put(name, name, 10)
    assert memory.get("a") == "a"
    memory.put("d", "d", 10)
    assert [memory.get(name) for name in "abcd"] == ["a", None, "c", "d"]
    memory.put("d", "D", 25)
    assert [memory.get(name) for name in "acd"] == [None, None, "D"]
    memory.put("e", "e", 31)
    assert memory.get("e") is None
    assert memory.held == 25


def test_files_are_ordinary_safetensors(tmp_path):
    Cache(tmp_path).get(KEY, value)
    assert same(load_file(tmp_path / f"{KEY}.safetensors"), value())
