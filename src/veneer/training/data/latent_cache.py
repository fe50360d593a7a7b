"""Content-addressed cache of latents and text embeddings, in memory and on disk; stale entries are never read.

A key is a digest of the image's bytes and preprocessing (or the prompt), the encoder's class, configuration and *weights*, and
the dtype. Files are safetensors with their key and a digest of their tensors; they are written under a temporary name, synced
and renamed. Corrupt files are recomputed. Several processes may share a folder.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import safetensors.torch
import torch
from torch import Tensor, nn

from veneer.injection.errors import OptionError, VeneerWarning
from veneer.injection.quantized_weight import plain_tensors, quantization_of

Value = TypeVar("Value")
_STALE_SECONDS = 3600.0


class CacheWarning(VeneerWarning):
    """A cache entry was recomputed, or the cache is in memory only from now on."""


def cache_key(*parts: str | int | float | torch.dtype) -> str:
    """Digest (40 hex digits) of an unambiguous encoding of the parts: `cache_key(example.key, encoder_digest(vae),
    torch.float16)`."""
    spelling = hashlib.blake2b(digest_size=20)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode("utf-8", "surrogatepass")
        spelling.update(b"%d:%s" % (len(text), text))
    return spelling.hexdigest()


class Memory(Generic[Value]):
    """LRU cache of at most `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self._values: OrderedDict[str, tuple[Value, int]] = OrderedDict()

    def get(self, key: str) -> Value | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: str, value: Value, weight: int) -> None:
        """Stores a value of `weight` bytes and evicts the least recently used; a value above the limit is not stored."""
        self.held -= self._values.pop(key, (None, 0))[1]
        if weight > self.limit:
            return
        self._values[key] = (value, weight)
        self.held += weight
        while self.held > self.limit:
            self.held -= self._values.popitem(last=False)[1][1]


class Cache:
    """Named tensors by content key, in memory and, if a folder is given, on disk.

    Args:
        folder: created if missing (default: memory only).
        memory: bytes of tensors kept in memory; others are read from disk or recomputed.

    Attributes:
        hits, misses: number of `get` calls that found the key, and that computed the value.
    """

    def __init__(self, folder: str | Path | None = None, memory: int = 2**30) -> None:
        self.folder = None if folder is None else Path(folder)
        self.hits = self.misses = 0
        self._memory: Memory[dict[str, Tensor]] = Memory(memory)
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                _sweep(self.folder)
            except OSError as error:
                self._without_disk(error)

    def get(self, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the tensors of `key` and computes them if missing: copies on the CPU without gradient, bitwise the same every
        time.

        Warns:
            CacheWarning: a corrupt file was recomputed; the disk is full or not writable, so the cache continues in memory; or
                the values are not finite and are not cached.

        Raises:
            OptionError: `key` is not from `cache_key`.
        """
        if not re.fullmatch("[0-9a-f]{40}", key):
            message = f"cache: {key!r} is not a key; expected 40 hex digits. Create it with cache_key()."
            raise OptionError(message, option="key", given=key, expected=40)
        value = self._memory.get(key)
        if value is None:
            value = self._read(key)
            self._remember(key, value)
        if value is not None:
            self.hits += 1
        else:
            self.misses += 1
            value = {name: each.detach().cpu().contiguous().clone() for name, each in compute().items()}
            self._keep(key, value)
        return {name: each.clone() for name, each in value.items()}

    def _keep(self, key: str, value: dict[str, Tensor]) -> None:
        broken = [name for name, each in value.items() if each.is_floating_point() and not each.isfinite().all()]
        if broken:
            message = f"cache: {', '.join(broken)} of {key} is not finite and is not cached (a VAE in float16?)"
            warnings.warn(CacheWarning(message, where=key, given=tuple(broken), expected="finite"), stacklevel=2)
            return
        self._remember(key, value)
        if self.folder is not None:
            try:
                _write(self.folder, key, value)
            except OSError as error:
                self._without_disk(error)

    def _remember(self, key: str, value: dict[str, Tensor] | None) -> None:
        if value is not None:
            self._memory.put(key, value, sum(each.numel() * each.element_size() for each in value.values()))

    def _read(self, key: str) -> dict[str, Tensor] | None:
        if self.folder is None:
            return None
        path = self.folder / f"{key}.safetensors"
        try:
            data = path.read_bytes()
            value = safetensors.torch.load(data)
            stored = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
            if stored.get("key") == key and stored.get("content") == _content(value):
                return value
            reason, given = "its content does not match its key", "mismatch"
        except FileNotFoundError:
            return None
        except Exception as error:  # a corrupt file may raise any parser error; recompute
            reason, given = str(error), "damaged"
        message = f"{path}: unusable cache entry ({reason}); recomputed"
        warnings.warn(CacheWarning(message, file=path, given=given), stacklevel=3)
        return None

    def _without_disk(self, error: OSError) -> None:
        message = f"{self.folder}: cannot be written ({error.strerror or error}); the cache continues in memory"
        warnings.warn(CacheWarning(message, file=self.folder, given=error.errno), stacklevel=2)
        self.folder = None


def _write(folder: Path, key: str, value: dict[str, Tensor]) -> None:
    data = safetensors.torch.save(value, metadata={"key": key, "content": _content(value)})
    handle, name = tempfile.mkstemp(dir=folder, prefix=f".{key}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, folder / f"{key}.safetensors")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _sweep(folder: Path) -> None:
    """Deletes incomplete files of killed processes, but not those that may still be written."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _raw(tensor: Tensor) -> memoryview:
    """Bytes of a dense tensor, without a copy if it is on the CPU."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _fold(item: tuple[str, Tensor]) -> str:
    name, tensor = item
    if tensor.device.type == "meta":
        message = f"encoder_digest: {name} is on the meta device and has no content. Load the weights first."
        raise OptionError(message, option="encoder", where=name, given="meta")
    return cache_key(name, tensor.dtype, *tensor.shape, hashlib.blake2b(_raw(tensor), digest_size=20).hexdigest())


def _content(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and all bytes; large tensors are hashed in threads, as hashing releases the GIL."""
    if sum(each.numel() for each in tensors.values()) < 2**20:
        return cache_key(*map(_fold, sorted(tensors.items())))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return cache_key(*pool.map(_fold, sorted(tensors.items())))


_digests: "WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]]" = WeakKeyDictionary()


def encoder_digest(module: nn.Module) -> str:
    """Digest of an encoder's class, configuration, dtypes and every byte of its parameters and buffers, including attached
    adapters.

    Cached per module object while the tensors' addresses, versions and a sample of their values are unchanged. A module with
    trainable parameters is hashed every time.

    Raises:
        OptionError: a tensor on the meta device.
    """
    tensors = dict(_tensors(module))
    identity = f"{type(module).__module__}.{type(module).__qualname__}", _config(module)
    if any(each.requires_grad for each in tensors.values()):
        return cache_key(*identity, _content(tensors))
    stamp = (*identity, *((name, *_hints(each)) for name, each in tensors.items()))
    if module not in _digests or _digests[module][0] != stamp:
        _digests[module] = (stamp, cache_key(*identity, _content(tensors)))
    return _digests[module][1]


def why_not_cached(module: nn.Module) -> str | None:
    """Why the outputs of an encoder must not be cached, or None if they may: it has trainable parameters (its own, tokens or
    adapters), or active dropout."""
    training = [name for name, each in module.named_parameters() if each.requires_grad]
    if training:
        return f"{type(module).__name__} has trainable parameters ({training[0]} and {len(training) - 1} more)"
    for name, each in module.named_modules():
        if isinstance(each, nn.modules.dropout._DropoutNd) and each.training and each.p > 0:
            return f"{type(module).__name__} is in training mode with dropout at {name}; call eval()"
    return None


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    if quantization_of(module) is not None:
        yield from plain_tensors(module)
        return
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _hints(tensor: Tensor) -> tuple[object, ...]:
    """Values that change with a tensor: address, version, and the sum of up to 64 values for writes that bypass the version
    counter."""
    version = 0 if tensor.is_inference() else tensor._version
    flat = tensor.detach().reshape(-1)
    seen = flat[:: max(1, flat.numel() // 64)].double().sum().item() if flat.numel() and not flat.is_meta else 0.0
    return tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), seen


def _config(module: nn.Module) -> str:
    """The configuration of a transformers or diffusers model, without paths and versions."""
    config: Any = getattr(module, "config", None)
    table = config.to_dict() if hasattr(config, "to_dict") else config
    kept = {str(k): v for k, v in table.items() if not str(k).startswith("_")} if isinstance(table, Mapping) else {}
    kept.pop("transformers_version", None)
    return json.dumps(kept, sort_keys=True, default=str)
