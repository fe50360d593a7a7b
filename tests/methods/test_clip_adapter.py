"""CLIP-Adapter against its equation, on CLIP and on timm models."""

import pytest
import timm
import torch

from tests.methods.classifiers import large, pictures, tiny
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.methods.additive.clip.clip_adapter import CLIPAdapter


def changed(f: torch.Tensor, down: torch.Tensor, up: torch.Tensor, r: float) -> torch.Tensor:
    return r * torch.relu(torch.relu(f @ down.T) @ up.T) + (1 - r) * f


@pytest.mark.parametrize("key", ["vit", "linear"])
def test_on_a_clip(key: str) -> None:
    model, image = tiny(key), pictures()
    features = model.clip.encode_image(image)
    tuned = attach(model, "clip_adapter", ratio=0.6)
    adapter = tuned.parts["head.features"][1]
    assert adapter.down.weight.shape == (4, 16)
    assert adapter.up.weight.shape == (16, 4)
    got = model(image)
    new = changed(features, adapter.down.weight, adapter.up.weight, 0.6)
    tuned.detach()
    torch.testing.assert_close(got, model.head(new))
    if key == "vit":
        weights = model.head.texts(features)
        cosines = [torch.stack([x @ w / (x.norm() * w.norm()) for w in weights]) for x in new]
        torch.testing.assert_close(got, model.clip.logit_scale.exp() * torch.stack(cosines))


def test_on_a_timm_model() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5).double().eval()
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    ((_, adapter),) = attach(model, "clip_adapter").parts.values()
    expected = changed(features, adapter.down.weight, adapter.up.weight, 0.2) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(image), expected)


def test_counts_of_the_paper() -> None:
    assert attach(large("ViT-B-16"), "clip_adapter").report().trainable == 2 * 512 * 128 == 131_072
    assert attach(large("RN50"), "clip_adapter").report().trainable == 2 * 1024 * 256 == 524_288


def test_options() -> None:
    with raises(OptionError, method="clip_adapter", option="ratio", given=1.5):
        CLIPAdapter(ratio=1.5)
    with raises(UnsupportedSite, method="clip_adapter", option="reduction", given=32):
        attach(tiny(), "clip_adapter", reduction=32)
