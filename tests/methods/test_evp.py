"""EVP against images composed pixel by pixel, the paper's update, and labels counted by hand."""

import collections
import copy

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import veneer
from tests.methods.pixels import frame, normal, raw, seen, shrunk, stirred, tiny
from tests.raising import raises
from veneer.injection import HostChanged, StateError, UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import FeatureSite, PixelSite, Port
from veneer.methods.prompt.pixels._label_map import most_frequent
from veneer.methods.prompt.pixels.evp import EVP

STEM = "patch_embed.proj"
INNER = (24, 36)  # 30 of 224 are 4 of 32 and 6 of 48


def site(height: int = 224, width: int = 224, channels: int = 3) -> PixelSite:
    normalization = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    return PixelSite(name="pixels", role="pixels", port=Port("", "in"), size=(height, width, channels), **normalization)


def framed(pictures: Tensor, prompt: Tensor) -> Tensor:
    """normalize(pad(shrunk) + δ), by the definition."""
    canvas = np.zeros(pictures.shape)
    canvas[:, :, 4:28, 6:42] = shrunk(pictures, INNER, Image.Resampling.BICUBIC)
    return normal(canvas + np.nan_to_num(frame(prompt, (32, 48), INNER)))


def test_the_image_equals_the_one_composed_by_hand() -> None:
    model = tiny()
    tuned = attach(model, "evp", where="pixels")
    stirred(tuned)
    prompt = tuned.parts["pixels"][1].prompt
    torch.testing.assert_close(seen(model, STEM, normal(raw())), framed(raw(), prompt), atol=2e-5, rtol=1e-5)


def test_it_starts_black() -> None:
    model = tiny()
    attach(model, "evp", where="pixels")
    got = seen(model, STEM, normal(raw()))
    black = normal(np.zeros((2, 3, 32, 48)))
    for place in (np.s_[:, :, :4], np.s_[:, :, 28:], np.s_[:, :, :, :6], np.s_[:, :, :, 42:]):
        torch.testing.assert_close(got[place], black[place])


def test_a_step_of_sgd_is_the_papers_update() -> None:
    """ḡ: mean over the batch of dL/dδ; δ ← δ − lr·mask ∘ ḡ / ‖ḡ‖, the norm over the whole image, before the mask."""
    bare, model = tiny(), tiny()
    tuned = attach(model, "evp", where="pixels")
    stirred(tuned, 0.1)
    prompt, labels = tuned.parts["pixels"][1].prompt, torch.tensor([1, 7])
    before = prompt.detach().clone()
    delta = torch.from_numpy(np.nan_to_num(frame(before, (32, 48), INNER))).float()
    noise = delta.repeat(2, 1, 1, 1).requires_grad_()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.2, 0.4, 0.7), (0.3, 0.5, 0.25)))
    canvas = framed(raw(), torch.zeros_like(before)) * std + mean
    F.cross_entropy(bare((canvas + noise - mean) / std), labels).backward()
    mean_gradient = noise.grad.mean(0)
    mask = torch.ones(3, 32, 48)
    mask[:, 4:28, 6:42] = 0
    assert (mean_gradient * mask).norm() < 0.9 * mean_gradient.norm()  # the middle counts in the norm
    expected = delta - 0.3 * mask * mean_gradient / mean_gradient.norm()

    optimizer = torch.optim.SGD(tuned.parameters(), 0.3)
    F.cross_entropy(model(normal(raw())), labels).backward()
    optimizer.step()
    got = np.nan_to_num(frame(prompt, (32, 48), INNER))
    torch.testing.assert_close(torch.from_numpy(got).float(), expected, atol=1e-4, rtol=1e-3)


def test_the_gradient_without_normalization_is_that_of_the_loss() -> None:
    model = tiny().double()
    tuned = attach(model, "evp", where="pixels", normalize_gradient=False)
    stirred(tuned, 0.1)
    prompt, pictures = tuned.parts["pixels"][1].prompt, normal(raw()).double()

    def value() -> Tensor:
        return F.cross_entropy(model(pictures), torch.tensor([1, 7]))

    (gradient,) = torch.autograd.grad(value(), [prompt])
    with torch.no_grad():
        for place in ((0, 0), (1, 300), (2, prompt.shape[1] - 1)):
            step = torch.zeros_like(prompt)
            step[place] = 1e-5
            prompt += step
            up = value()
            prompt -= 2 * step
            slope = (up - value()) / 2e-5
            prompt += step
            torch.testing.assert_close(gradient[place], slope, atol=1e-8, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own tracing
def test_compiled_training_has_the_same_gradient() -> None:
    model = tiny()
    tuned = attach(model, "evp", where="pixels")
    stirred(tuned, 0.1)
    pictures, labels, gradients = normal(raw()), torch.tensor([1, 7]), []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        gradients += torch.autograd.grad(F.cross_entropy(run(pictures), labels), list(tuned.parameters()))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    torch._dynamo.reset()


def test_counts() -> None:
    assert EVP().count(site()) == 69_840 == 3 * (224**2 - 164**2)
    assert EVP(border=1).count(site(32, 64, 1)) == 32 * 64 - 30 * 62
    assert attach(tiny(), "evp").report().trainable == 3 * (32 * 48 - 24 * 36)


def test_options_and_sites_are_rejected_with_a_message() -> None:
    for options in ({"border": 0}, {"border": 112}, {"classes": -1}):
        ((option, given),) = options.items()
        with raises(OptionError, method="evp", option=option, given=given):
            EVP(**options)
    with raises(OptionError, option="border", expected=(2, 2)):
        EVP(border=111).build(site(2, 2))
    with raises(OptionError, where="p", option="mean", given=(3, 3), expected=1):
        EVP().build(PixelSite(name="p", role="pixels", port=Port("", "in"), size=(32, 32, 1), mean=(0.5,) * 3, std=(0.5,) * 3))
    with raises(UnsupportedSite, method="evp", site="head.logits", option="classes", given=11):
        attach(tiny(), "evp", classes=11)


def test_each_class_gets_its_most_frequent_prediction() -> None:
    counts = torch.tensor([[0, 5, 1], [3, 5, 0], [3, 1, 0], [0, 9, 0]])
    assert most_frequent(counts).tolist() == [1, 3, 0]
    tied = torch.tensor([[2, 0], [2, 0]])
    assert most_frequent(tied).tolist() == [0, 0]


def answered(model: nn.Module, pictures: Tensor, labels: Tensor, classes: int) -> list[collections.Counter[int]]:
    """How often each source label is predicted for each class, image by image."""
    found: list[collections.Counter[int]] = [collections.Counter() for _ in range(classes)]
    with torch.no_grad():
        for picture, label in zip(pictures, labels.tolist(), strict=True):
            found[label][int(model(picture[None]).argmax())] += 1
    return found


def test_prepare_counts_predictions_with_the_border() -> None:
    model = tiny()
    pictures, labels = normal(raw(40)) * 3, torch.arange(40) % 3
    alone = attach(model, "evp", where="pixels")
    expected = [max(sorted(c), key=c.__getitem__) for c in answered(model, pictures, labels, 3)]
    assert expected != [0, 1, 2]
    alone.detach()
    tuned = attach(model, "evp", classes=3)
    tuned.prepare(zip(pictures.split(16), labels.split(16), strict=True))
    assert tuned.parts["head.logits"][1].index.tolist() == expected
    assert model(pictures).shape == (40, 3)
    alone = attach(copy.deepcopy(tiny()), "evp", where="pixels")
    with torch.no_grad():
        torch.testing.assert_close(model(pictures), alone.towers[""](pictures)[:, expected], atol=1e-6, rtol=1e-5)


def test_prepare_reports_errors() -> None:
    model = tiny()
    tuned = attach(model, "evp", classes=3)
    with raises(OptionError, option="classes", where="head.logits", given=(0, 3), expected=3):
        tuned.prepare([(normal(raw(4)), torch.arange(4))])
    with raises(OptionError, option="batches", where="head.logits", given=0):
        tuned.prepare([])
    with raises(OptionError, option="labels", where="head.logits", given=3, expected=4):
        tuned.prepare([(normal(raw(4)), torch.arange(3))])
    with tuned.enabled(False), raises(StateError, where="head.logits", given="disabled"):
        tuned.prepare([(normal(raw(3)), torch.arange(3))])
    assert tuned.parts["head.logits"][1].seen is None


def test_mapped_labels_are_switched() -> None:
    bare, model = tiny(), tiny()
    tuned = attach(model, "evp", classes=3)
    with raises(StateError, where="head.logits", given=0.5, expected=(0, 1)):
        tuned.scale = 0.5
    assert tuned.scale == 1.0
    with torch.no_grad(), tuned.enabled(False):
        assert torch.equal(model(normal(raw())), bare(normal(raw())))
    assert model(normal(raw())).shape == (2, 3)
    other = attach(model, "lora")
    with raises(UnsupportedSite, where="evp", given="SwitchSeam"), veneer.mixed(model, ["evp", "lora"]):
        pass
    with veneer.mixed(model, [("evp", "lora"), "evp"]):
        assert model(normal(raw())).shape == (2, 3)
    other.detach()


def test_samples_of_a_batch_differ() -> None:
    """In the model's own forward pass as well."""
    model, pictures = tiny(), normal(raw(4))
    tuned = attach(model, "evp", where="pixels")
    stirred(tuned)
    with torch.no_grad():
        on = model(pictures)
        with tuned.enabled(False):
            off = model(pictures)
        with veneer.mixed(model, ["evp", None, "evp", None]):
            got = model(pictures)
    torch.testing.assert_close(got, torch.stack([on[0], off[1], on[2], off[3]]))


def test_compiled_mapped_labels_switch() -> None:
    model = tiny()
    tuned = attach(model, "evp", classes=3)
    pictures = normal(raw())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pictures), model(pictures))
        with tuned.enabled(False):
            assert compiled(pictures).shape == (2, 10)
            torch.testing.assert_close(compiled(pictures), model(pictures))
    torch._dynamo.reset()


def test_a_second_map_on_a_head_is_rejected_when_it_runs() -> None:
    model = tiny()
    attach(model, "evp", classes=3)
    attach(model, "evp", classes=3, name="second")
    with raises(HostChanged, where="head.logits", given=3, expected=10):
        model(normal(raw()))


def test_the_map_is_saved_and_loaded_bitwise(tmp_path) -> None:
    model = tiny()
    tuned = attach(model, "evp", classes=3)
    stirred(tuned)
    tuned.parts["head.logits"][1].index.copy_(torch.tensor([7, 2, 7]))
    expected = model(normal(raw()))
    other = tiny()
    loaded = veneer.load(other, tuned.save(tmp_path / "evp"))
    assert loaded.parts["head.logits"][1].index.tolist() == [7, 2, 7]
    assert torch.equal(other(normal(raw())), expected)


def test_a_convolutional_model_takes_other_sizes() -> None:
    """Framed at the prompt's size, and resized to the image's."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, num_classes=4).eval()
    tuned = attach(model, "evp", where="pixels")
    stirred(tuned)
    pictures = torch.rand(1, 3, 64, 80)
    at_full_size = seen(model, "conv1", F.interpolate(pictures, (224, 224), mode="bicubic", antialias=True))
    got = seen(model, "conv1", pictures)
    assert got.shape == pictures.shape
    brought = F.interpolate(at_full_size, (64, 80), mode="bilinear", antialias=True)
    torch.testing.assert_close(got[..., :8, :], brought[..., :8, :], atol=1e-4, rtol=1e-4)


def test_clips_image_tower_by_position_name_and_itself() -> None:
    torch.manual_seed(0)
    vision, text = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 1, "head_width": 12}, {"context_length": 8}
    words = {**text, "vocab_size": 64, "width": 20, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=words).eval()
    bare = copy.deepcopy(model)
    tuned = attach(model, "evp")
    stirred(tuned)
    assert list(tuned.parts) == ["visual.pixels"]
    pictures, ids = torch.randn(2, 3, 32, 32), torch.randint(1, 64, (2, 8))
    with torch.no_grad():
        by_name, by_place = model(image=pictures, text=ids), model(pictures, ids)
        features = F.normalize(model.encode_image(pictures), dim=-1)
        assert torch.equal(by_name[0], by_place[0])
        torch.testing.assert_close(by_name[0], features)
        assert (by_name[0] - bare(image=pictures)[0]).abs().max() > 1e-3
        torch.testing.assert_close(by_name[1], bare(text=ids)[1])


def test_logits_with_trailing_dimensions() -> None:
    """Convolutional heads give (B, K, 1, 1)."""
    where = FeatureSite(name="h", role="logits", port=Port("h", "out"), width=4, classes=6, head="h")
    adapter = EVP(classes=2).build(where)
    adapter.index.copy_(torch.tensor([5, 0]))
    y = torch.randn(2, 6, 1, 1)
    assert torch.equal(adapter.output(y, y), torch.stack([y[:, 5], y[:, 0]], 1))
