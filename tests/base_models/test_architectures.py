"""Architectures of published models: parameter counts, tokens, and that they are no base models."""

from __future__ import annotations

import pytest

from tests.raising import raises
from veneer import base_models
from veneer.base_models.clip_vocabulary import clip_tokenizer
from veneer.injection import UnknownName

COUNTS = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "text_encoder": 340_387_840},
    "sdxl": {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd3": {"transformer": 2_028_328_000, "text_encoder_3": 4_762_310_656},
    "sd35": {"transformer": 2_243_171_520},
    "sd35-large": {"transformer": 8_056_627_520},
    "flux": {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656},
    "pixart": {"transformer": 611_349_152},
    "dit": {"transformer": 749_826_464},
    "chroma": {"transformer": 8_899_983_424, "text_encoder": 4_762_310_656},
    "flux2": {"transformer": 32_223_281_152},
    "flux2-klein-4b": {"transformer": 3_875_544_576},
    "flux2-klein-9b": {"transformer": 9_078_581_248},
    "z-image": {"transformer": 6_154_908_736},
    "qwen-image": {"transformer": 20_430_401_088},
    "lumina2": {"transformer": 2_609_769_152},
    "wan-1.3b": {"transformer": 1_418_996_800},
    "wan-5b": {"transformer": 4_999_787_712},
    "wan-14b": {"transformer": 14_288_491_584},
    "wan-14b-i2v": {"transformer": 16_394_878_784},
    "hunyuan-video": {"transformer": 12_821_012_544},
    "krea-2": {"transformer": 12_820_073_036},
    "sana": {"transformer": 1_604_462_752},
}
"""Parameters of the published checkpoints. The fixed position embedding of DiT-XL/2 is not a parameter."""


@pytest.mark.parametrize("name", base_models.ARCHITECTURES)
def test_parameter_counts_are_those_of_the_published_models(name: str) -> None:
    parts = base_models.architecture(name).components
    for part, count in COUNTS[name].items():
        parameters = list(parts[part].parameters())
        assert sum(p.numel() for p in parameters) == count
        assert all(p.is_meta for p in parameters)


def test_tokens_are_those_of_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip")
    texts = ["a photo of a <toy>, 12 o'clock!", "Ünïcode – 你好 🙂", "hello   WORLD's"]
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49408
    for text, row in zip(texts, open_clip.tokenize(texts).tolist(), strict=True):
        end = row.index(49407) + 1
        assert tokenizer(text).input_ids == row[:end]


def test_an_architecture_is_no_base_model() -> None:
    with raises(base_models.BaseModelError, where="kind", given="sdxl", expected="weights"):
        base_models.load("sdxl")
    with raises(UnknownName, name="sd99", kind="architecture", expected=tuple(base_models.ARCHITECTURES)):
        base_models.architecture("sd99")
