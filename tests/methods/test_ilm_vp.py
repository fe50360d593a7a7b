"""ILM-VP against images composed pixel by pixel, and an assignment by searching all pairs each time."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import veneer
from tests.methods.pixels import frame, normal, raw, seen, shrunk, stirred, tiny
from tests.raising import raises
from veneer.injection import UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import PixelSite, Port
from veneer.methods.prompt.pixels._label_map import one_to_one
from veneer.methods.prompt.pixels.ilm_vp import ILMVP

STEM = "patch_embed.proj"


def framed(pictures: Tensor, prompt: Tensor, size: tuple[int, int], inner: tuple[int, int]) -> Tensor:
    """normalize(pad(shrunk) + M ∘ σ(δ)), by the definition."""
    top, left = ((o - i + 1) // 2 for o, i in zip(size, inner, strict=True))
    canvas = np.zeros(pictures.shape)
    canvas[:, :, top : top + inner[0], left : left + inner[1]] = shrunk(pictures, inner, Image.Resampling.BILINEAR)
    return normal(canvas + np.nan_to_num(1 / (1 + np.exp(-frame(prompt, size, inner)))))


@pytest.mark.parametrize(("picture", "inner"), [(128, (18, 27)), (30, (4, 6)), (221, (32, 47)), (3, (1, 1))])
def test_the_image_equals_the_one_composed_by_hand(picture: int, inner: tuple[int, int]) -> None:
    """Also with an extra row or column on one side, and with a frame on one side only."""
    model = tiny()
    tuned = attach(model, "ilm_vp", where="pixels", picture=picture)
    stirred(tuned)
    prompt = tuned.parts["pixels"][1].prompt
    expected = framed(raw(), prompt, (32, 48), inner)
    torch.testing.assert_close(seen(model, STEM, normal(raw())), expected, atol=2e-5, rtol=1e-5)


def test_it_starts_gray() -> None:
    model = tiny()
    attach(model, "ilm_vp", where="pixels")
    got = seen(model, STEM, normal(raw()))
    torch.testing.assert_close(got[:, :, :7], normal(np.full((2, 3, 32, 48), 0.5))[:, :, :7])


def test_counts() -> None:
    site = PixelSite(name="p", role="pixels", port=Port("", "in"), size=(224, 224, 3), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert ILMVP().count(site) == 3 * (224**2 - 128**2) == 101_376
    assert ILMVP(picture=32).count(site) == 3 * (224**2 - 32**2)
    assert attach(tiny(), "ilm_vp").report().trainable == 3 * (32 * 48 - 18 * 27)


def test_options_are_rejected_with_a_message() -> None:
    for options in ({"picture": 0}, {"picture": 224}, {"classes": -1}):
        ((option, given),) = options.items()
        with raises(OptionError, method="ilm_vp", option=option, given=given):
            ILMVP(**options)
    with raises(UnsupportedSite, method="ilm_vp", option="border"):
        attach(tiny(), "ilm_vp", picture=223)


def looked_through(counts: list[list[int]]) -> list[int]:
    """Of all pairs whose label and class are both free, take the first of the largest count; again, until all have one."""
    labels, classes = len(counts), len(counts[0])
    found: dict[int, int] = {}
    while len(found) < classes:
        free = [(s, t) for s, t in itertools.product(range(labels), range(classes)) if t not in found and s not in found.values()]
        source, target = max(free, key=lambda pair: counts[pair[0]][pair[1]])  # the first of several
        found[target] = source
    return [found[t] for t in range(classes)]


@pytest.mark.parametrize("seed", range(40))
def test_labels_are_assigned_greedily_over_all_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels, classes = [(7, 3), (5, 5), (12, 1), (9, 6)][seed % 4]
    most = [2, 4, 50, 1][seed // 4 % 4]  # small numbers: many pairs are counted as often, many never
    counts = torch.randint(0, most + 1, (labels, classes), generator=generator)
    got = one_to_one(counts).tolist()
    assert got == looked_through(counts.tolist())
    assert len(set(got)) == classes


def test_no_counts_give_the_first_labels() -> None:
    assert one_to_one(torch.zeros(5, 3, dtype=torch.long)).tolist() == [0, 1, 2]


def table(model: nn.Module, pictures: Tensor, labels: Tensor, classes: int) -> list[list[int]]:
    """Predictions of a model by source label and class, image by image."""
    counts = [[0] * classes for _ in range(10)]
    with torch.no_grad():
        for picture, label in zip(pictures, labels.tolist(), strict=True):
            counts[int(model(picture[None]).argmax())][label] += 1
    return counts


def test_prepare_counts_with_the_current_frame() -> None:
    pictures, labels, maps = normal(raw(60)) * 3, torch.arange(60) % 4, []
    model = tiny()
    tuned = attach(model, "ilm_vp", classes=4)
    index = tuned.parts["head.logits"][1].index
    for _ in range(2):
        other = tiny()
        alone = attach(other, "ilm_vp", where="pixels")
        alone.load_state_dict({"pixels:prompt": tuned.state_dict()["pixels:prompt"]})
        expected = looked_through(table(other, pictures, labels, 4))
        model.train()
        tuned.prepare(zip(pictures.split(25), labels.split(25), strict=True))
        assert all(module.training for module in model.modules())
        model.eval()
        assert index.tolist() == expected
        maps.append(expected)
        with torch.no_grad():
            tuned.parts["pixels"][1].prompt.copy_(torch.tensor([[9.0], [-9.0], [-9.0]]).expand(3, -1))  # red
    assert maps[0] != maps[1]
    assert ILMVP.prepares == "epoch"


def test_every_head_has_a_map_of_its_own() -> None:
    torch.manual_seed(0)
    model = veneer.hosts.get("timm_vit")().tiny()["deit_distilled"]()
    with torch.no_grad():
        model.head_dist.bias[4] += 100
        model.head.bias[6] += 100
    tuned = attach(model, "ilm_vp", classes=2)
    tuned.prepare([(torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.long))])
    assert tuned.parts["head_dist.logits"][1].index[0] == 4
    assert tuned.parts["head.logits"][1].index[0] == 6
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 2)


def test_a_step_moves_the_frame_and_no_map(tmp_path) -> None:
    model = tiny()
    tuned = attach(model, "ilm_vp", classes=3)
    before = {k: v.clone() for k, v in tuned.state_dict().items()}
    assert [name for name, _ in tuned.named_parameters()] == ["pixels:prompt"]
    optimizer = torch.optim.Adam(tuned.parameters(), 1e-2)
    nn.functional.cross_entropy(model(normal(raw())), torch.tensor([0, 2])).backward()
    optimizer.step()
    after = tuned.state_dict()
    assert not torch.equal(after["pixels:prompt"], before["pixels:prompt"])
    assert torch.equal(after["head.logits:index"], before["head.logits:index"])
    other = tiny()
    loaded = veneer.load(other, tuned.save(tmp_path / "ilm"))
    assert loaded.method == ILMVP(classes=3)
    assert torch.equal(other(normal(raw())), model(normal(raw())))
