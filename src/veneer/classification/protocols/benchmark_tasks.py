"""Tasks and settings of the protocols VTAB-1k, FGVC and CoOp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from veneer.training.data.image_io import DataError

NATURAL = ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397")
SPECIALIZED = ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy")
STRUCTURED = (
    "clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori", "smallnorb_azi", "smallnorb_ele",
)  # fmt: skip
SHOTS = (1, 2, 4, 8, 16)
"""Training images per class of CoOp's protocol."""


@dataclass(frozen=True)
class Protocol:
    """A published benchmark.

    Args:
        name: as in `--protocol`.
        groups: group of tasks to the folders of its tasks.
        aliases: other folder names of a task.
        settings: options of `CompareConfig` that the protocol sets.
        defaults: options that it sets unless the user does.
    """

    name: str
    groups: Mapping[str, tuple[str, ...]]
    settings: Mapping[str, Any]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, tuple[str, ...]]

    def tasks(self, root: Path) -> dict[str, Path]:
        """Task to its folder, of the tasks that `root` has, in the order of the groups.

        Raises:
            DataError: `root` has none of the tasks.
        """
        names = [name for group in self.groups.values() for name in group]
        folders = {name: [root / each for each in (name, *self.aliases.get(name, ()))] for name in names}
        tasks = {name: next((path for path in paths if path.is_dir()), None) for name, paths in folders.items()}
        present = {name: path for name, path in tasks.items() if path is not None}
        if not present:
            message = f"{root}: no task of {self.name}; expected at least one of the folders {', '.join(names)}."
            raise DataError(message, file=root, where="tasks", given=(), expected=tuple(names))
        return present


VTAB = Protocol(
    "vtab-1k",
    {"natural": NATURAL, "specialized": SPECIALIZED, "structured": STRUCTURED},
    {"augment": "none", "squash": True, "keep_epoch": "last"},
    {"epochs": 100, "batch": 64, "first_seed": 0},
    {},
)
"""1,000 training images, resized to the model's side without a crop, no augmentation, 100 epochs, the last epoch.

Source: Zhai et al., A Large-scale Study of Representation Learning with the Visual Task Adaptation Benchmark, 2019; epochs,
batch size and preprocessing of Jie and Deng, FacT, AAAI 2023, and its code.
"""
FGVC = Protocol(
    "fgvc",
    {"fgvc": ("CUB_200_2011", "nabirds", "OxfordFlowers", "Stanford-dogs", "Stanford-cars")},
    {"augment": "flip", "squash": False, "keep_epoch": "best"},
    {"epochs": 100, "batch": 64, "first_seed": 0},
    {
        "CUB_200_2011": ("CUB", "cub"),
        "nabirds": ("NABirds",),
        "OxfordFlowers": ("oxford_flowers", "flowers"),
        "Stanford-dogs": ("StanfordDogs", "stanford_dogs", "dogs"),
        "Stanford-cars": ("StanfordCars", "stanford_cars", "cars"),
    },
)
"""Full training sets, random crops and horizontal flips, 100 epochs, the epoch of the best validation accuracy.

Source: Jia et al., Visual Prompt Tuning, ECCV 2022, and its code.
"""
COOP = Protocol(
    "coop",
    {
        "coop": (
            "caltech-101", "oxford_pets", "stanford_cars", "oxford_flowers", "food-101", "fgvc_aircraft", "sun397", "dtd",
            "eurosat", "ucf101",
        )
    },
    {"augment": "flip", "squash": False, "keep_epoch": "last"},
    {"epochs": 50, "batch": 32, "first_seed": 1},
    {},
)  # fmt: skip
"""1, 2, 4, 8 and 16 training images per class, sampled with the seeds 1, 2 and 3; the last epoch.

Source: Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, and its code. Deviations: 50 epochs for all shots
(the authors: 50 for 1 shot, 100 for 2 and 4, 200 for 8 and 16; set them with `--epochs`); without ImageNet.
"""
PROTOCOLS = {protocol.name: protocol for protocol in (VTAB, FGVC, COOP)}
