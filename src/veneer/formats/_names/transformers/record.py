"""The names of a family's modules in files: a table from the original release to diffusers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Paths = Mapping[str, tuple[str, ...]]
"""Path of a module in the original release -> diffusers' paths of its rows, in order: several for a fused projection."""
Names = dict[str, tuple[tuple[str, ...], bool]]
"""Path of a module in the original release -> diffusers' paths of its rows, and whether its halves are swapped."""
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


@dataclass(frozen=True)
class BlockNames:
    """A list of blocks.

    Args:
        own: its path in diffusers. `original`: its path in the original release.
        modules: of one block, below these paths; a block lacks those whose weights it does not have.
        swapped_last: modules of the last block whose halves are swapped.
    """

    own: str
    original: str
    modules: Paths
    swapped_last: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransformerNames:
    """The names of the modules of a family of diffusion transformers in files.

    Args:
        classes: names of the classes of diffusers.
        blocks: lists of blocks. `modules`: modules outside of the blocks.
        swapped: modules whose halves of rows, shift and scale, have the other order in diffusers.
        spellings: further spellings of the original paths that are read; each is a list of replacements (text, by).
        prefixes: before dotted original paths; the first is written.
        network_module: of kohya's trainers, which write the family as `lora_unet_…`; None if they do not support it.
        version: `ss_base_model_version` of kohya's trainers, if they have one.
        model_spec: maps a model's config to the architecture that ModelSpec and kohya's trainers name.
    """

    classes: tuple[str, ...]
    blocks: tuple[BlockNames, ...]
    modules: Paths
    swapped: tuple[str, ...] = ()
    spellings: tuple[Mapping[str, str], ...] = ()
    prefixes: tuple[str, ...] = ("diffusion_model",)
    network_module: str | None = None
    version: str | None = None
    model_spec: Callable[[Mapping[str, Any]], str | None] = field(default=lambda config: None)

    def names(self, model: nn.Module) -> Names:
        """The modules of a model by their original paths; also those that the model may lack."""
        names: Names = {}
        for blocks in self.blocks:
            last = _length(model, blocks.own) - 1
            for i in range(last + 1):
                for name, paths in blocks.modules.items():
                    own = tuple(f"{blocks.own}.{i}.{path}" for path in paths)
                    names[f"{blocks.original}.{i}.{name}"] = own, i == last and name in blocks.swapped_last
        return names | {name: (paths, name in self.swapped) for name, paths in self.modules.items()}

    def other_spellings(self, path: str) -> tuple[str, ...]:
        """Further spellings of an original path."""
        spellings = dict.fromkeys(_replace(path, replacements) for replacements in self.spellings)
        return tuple(name for name in spellings if name != path)


def two_layers(own: str, *names: str) -> Paths:
    """The layers `linear_1` and `linear_2` of an embedder at the path `own`, by their original names."""
    return {name: (f"{own}.linear_{i}",) for i, name in enumerate(names, 1)}


def same(*names: str) -> Paths:
    """Modules with the same path in diffusers."""
    return {name: (name,) for name in names}


def _replace(path: str, replacements: Mapping[str, str]) -> str:
    for text, by in replacements.items():
        path = path.replace(text, by)
    return path


def _length(model: nn.Module, path: str) -> int:
    """Number of blocks in a list; 0 if the model has no such list."""
    try:
        blocks: Iterable[nn.Module] = model.get_submodule(path).children()
    except AttributeError:
        return 0
    return sum(1 for _ in blocks)
