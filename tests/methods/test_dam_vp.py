"""DAM-VP against prompts that are added by hand, image by image, and clusters by a slow agglomeration."""

import copy

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.methods.pixels import frame, normal, raw, seen, stirred, tiny
from tests.raising import raises
from veneer.injection import StateError, UnsupportedSite, attach
from veneer.injection.errors import OptionError
from veneer.injection.sites import PixelSite, Port
from veneer.methods.prompt.pixels._clusters import Clusters, cluster_labels
from veneer.methods.prompt.pixels.dam_vp import DAMVP

STEM = "patch_embed.proj"
INNER = (24, 36)


def features(model: nn.Module, pictures: Tensor) -> Tensor:
    """Input of the head of a bare ViT."""
    with torch.no_grad():
        return model.forward_head(model.forward_features(pictures), pre_logits=True)


def prepared(model: nn.Module, pictures: Tensor, **options):
    """Attached, clustered and perturbed."""
    tuned = attach(model, "dam_vp", **{"clusters": 3, **options})
    tuned.prepare(zip(pictures.split(7), torch.zeros(len(pictures)).split(7), strict=True))
    stirred(tuned)
    return tuned


def by_hand(model: nn.Module, tuned, pictures: Tensor) -> Tensor:
    """x + δ_c for each image, c the nearest prototype."""
    adapter = tuned.parts["pixels"][1]
    found = int(adapter.shared.found)
    rows = []
    for picture, row in zip(pictures, features(model, pictures), strict=True):
        distances = [float(((row - p) ** 2).sum()) for p in adapter.shared.prototypes[:found]]
        added = np.nan_to_num(frame(adapter.prompt[int(np.argmin(distances))], (32, 48), INNER))
        rows.append(picture + torch.from_numpy(added).float())
    return torch.stack(rows)


def test_each_image_gets_the_prompt_of_its_cluster() -> None:
    bare, model, pictures = tiny(), tiny(), normal(raw(20)) * 2
    tuned = prepared(model, pictures)
    expected = by_hand(bare, tuned, pictures)
    got = seen(model, STEM, pictures)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    clusters = tuned.parts["pixels"][1].shared
    assert len(clusters.nearest(features(bare, pictures)).unique()) == 3
    with torch.no_grad():
        torch.testing.assert_close(model(pictures), bare(expected), atol=1e-5, rtol=1e-4)


def agglomerated(rows: Tensor, most: int, threshold: float) -> set[frozenset[int]]:
    """Merge the two clusters with the smallest average distance, until they are few and distant enough."""
    clusters = [[i] for i in range(len(rows))]

    def apart(a: list[int], b: list[int]) -> float:
        return float(np.mean([float((rows[i] - rows[j]).norm()) for i in a for j in b]))

    while len(clusters) > 1:
        pairs = [(apart(a, b), i, j) for i, a in enumerate(clusters) for j, b in enumerate(clusters) if i < j]
        distance, i, j = min(pairs)
        if len(clusters) <= most and (not threshold or distance >= threshold):
            break
        clusters[i] += clusters.pop(j)
    return {frozenset(c) for c in clusters}


@pytest.mark.parametrize(("most", "threshold"), [(4, 0.0), (9, 3.0), (2, 1.0), (50, 0.0), (20, 100.0)])
def test_clusters(most: int, threshold: float) -> None:
    rows = torch.randn(18, 5, generator=torch.Generator().manual_seed(1)) * 2
    labels = cluster_labels(rows, most, threshold)
    got = {frozenset((labels == i).nonzero().flatten().tolist()) for i in labels.unique()}
    assert got == agglomerated(rows, most, threshold)
    clusters = Clusters(most, 5)
    clusters.gather(rows, threshold)
    assert int(clusters.found) == len(got)
    means = {tuple(rows[list(c)].mean(0).mul(1e4).round().tolist()) for c in got}
    assert {tuple(p.mul(1e4).round().tolist()) for p in clusters.prototypes[: len(got)]} == means


def test_one_image_is_one_cluster() -> None:
    assert cluster_labels(torch.randn(1, 5), 4, 0.0).tolist() == [0]


def test_unused_prototypes_are_never_nearest() -> None:
    clusters = Clusters(4, 2)
    clusters.prototypes.copy_(torch.tensor([[5.0, 5.0], [9.0, 9.0], [0.0, 0.0], [0.0, 0.0]]))
    clusters.found.fill_(2)
    assert clusters.nearest(torch.tensor([[0.0, 0.1], [8.0, 8.0]])).tolist() == [0, 1]


def test_the_first_features_of_a_pass_count() -> None:
    """A second head, and a pass inside of another attachment, give more."""
    clusters, rows = Clusters(2, 3), torch.randn(4, 3)

    def run(pictures: Tensor) -> None:
        clusters.capture(pictures)
        clusters.capture(pictures + 1)

    assert torch.equal(clusters.features(run, rows), rows)
    clusters.capture(rows)
    assert clusters.captured is None


def test_prepare_takes_the_first_images_of_an_unprompted_model() -> None:
    bare, model, pictures = tiny(), tiny(), normal(raw(30)) * 2
    tuned = attach(model, "dam_vp", clusters=2, samples=10)
    model.train()
    tuned.prepare(zip(pictures.split(7), torch.zeros(30).split(7), strict=True))
    rows = features(bare, pictures)[:10]
    labels = cluster_labels(rows, 2, 0.0)
    expected = torch.stack([rows[labels == i].mean(0) for i in range(2)])
    torch.testing.assert_close(tuned.parts["pixels"][1].shared.prototypes, expected, atol=1e-5, rtol=1e-4)


def test_the_first_pass_is_in_eval_and_without_a_graph() -> None:
    torch.manual_seed(0)
    model = veneer.hosts.get("timm_conv")().tiny()["resnet"]()
    where = "name:pixels", "name:fc.features"
    tuned = attach(model, "dam_vp", where=where, clusters=2)
    pictures = torch.randn(6, 3, 64, 64)
    tuned.prepare([(pictures, torch.zeros(6))])
    model.train()
    calls: list[tuple[bool, bool]] = []
    model.fc.register_forward_pre_hook(lambda module, args: calls.append((module.training, torch.is_grad_enabled())))
    model(pictures).sum().backward()
    assert calls == [(False, False), (True, True)]
    assert all(module.training for module in model.modules())
    assert int(model.bn1.num_batches_tracked) == 1


def test_strength_multiplies_the_prompt() -> None:
    model, pictures = tiny(), normal(raw())
    tuned = prepared(model, normal(raw(20)) * 2)
    whole = seen(model, STEM, pictures)
    tuned.scale = 0.25
    torch.testing.assert_close(seen(model, STEM, pictures), pictures + 0.25 * (whole - pictures), atol=1e-5, rtol=1e-5)


def test_every_prompt_starts_alike_and_only_those_used_are_trained() -> None:
    model, pictures = tiny(), normal(raw(20)) * 2
    tuned = attach(model, "dam_vp", clusters=3)
    adapter = tuned.parts["pixels"][1]
    assert torch.equal(adapter.prompt[0], adapter.prompt[2])
    assert 0.95 < adapter.prompt[0].std() < 1.05
    tuned.prepare([(pictures, torch.zeros(20))])
    which = adapter.shared.nearest(features(tiny(), pictures[:1]))
    model(pictures[:1]).sum().backward()
    moved = adapter.prompt.grad.flatten(1).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == which.tolist()
    assert not attach(tiny(), "dam_vp", std=0.0).parts["pixels"][1].prompt.any()


def test_the_most_active_features_are_the_logits() -> None:
    bare, model, pictures = tiny(), tiny(), normal(raw(20)) * 2
    tuned = prepared(model, pictures, head_free=True, classes=4)
    noise = torch.randn(512, 3, 32, 48, generator=torch.Generator().manual_seed(9))
    spread = features(bare, noise).std(0)
    index = tuned.parts["head.logits"][1].index
    assert index.tolist() == sorted(index.tolist())
    others = [i for i in range(24) if i not in index.tolist()]
    assert spread[index].min() > 0.97 * spread[others].max()  # other noise, so nearly as active ones may change places
    with torch.no_grad():
        expected = features(bare, by_hand(bare, tuned, pictures))[:, index]
        torch.testing.assert_close(model(pictures), expected, atol=1e-5, rtol=1e-4)
    with raises(StateError, given=0.5, expected=(0, 1)):
        tuned.scale = 0.5


def test_a_prepared_model_copies_saves_and_compiles(tmp_path) -> None:
    model, pictures = tiny(), normal(raw(20)) * 2
    tuned = prepared(model, pictures, head_free=True, classes=4)
    expected = model(pictures)
    other = tiny()
    loaded = veneer.load(other, tuned.save(tmp_path / "dam"))
    assert torch.equal(other(pictures), expected)
    assert loaded.parts["pixels"][1].shared is loaded.parts["head.features"][1].shared
    twin = copy.deepcopy(model)
    assert twin.get_submodule("veneer_dam_vp").adapters[0].__dict__["inner"] is twin
    tuned.detach()
    assert tuned.parts["pixels"][1].__dict__["inner"] is None
    assert torch.equal(twin(pictures), expected)
    with torch.no_grad():
        compiled = torch.compile(twin, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(pictures), expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_two_of_them_each_read_the_unprompted_image() -> None:
    bare, model, pictures = tiny(), tiny(), normal(raw(20)) * 2
    first, second = prepared(model, pictures), prepared(model, pictures, clusters=2)
    both = by_hand(bare, first, pictures) + by_hand(bare, second, pictures) - pictures
    torch.testing.assert_close(seen(model, STEM, pictures), both, atol=1e-5, rtol=1e-5)


def test_samples_of_a_batch_cannot_differ() -> None:
    """The first pass is one of all samples."""
    model, pictures = tiny(), normal(raw(4))
    attach(model, "dam_vp")
    with veneer.mixed(model, ["dam_vp", None, None, "dam_vp"]), raises(StateError, given=2, expected=4):
        model(pictures)
    with veneer.mixed(model, ["dam_vp"] * 4):
        assert model(pictures).shape == (4, 10)


def test_clip() -> None:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 24, "layers": 1, "head_width": 12}
    words = {"context_length": 8, "vocab_size": 64, "width": 20, "heads": 2, "layers": 1}
    model = open_clip.model.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=words).eval()
    bare = copy.deepcopy(model)
    tuned = attach(model, "dam_vp", clusters=2)
    assert list(tuned.parts) == ["visual.pixels", "visual.features"]
    pictures, ids = torch.randn(9, 3, 32, 32), torch.randint(1, 64, (9, 8))
    tuned.prepare([(pictures, torch.zeros(9))])
    with torch.no_grad():
        rows = bare.visual(pictures)
        labels = cluster_labels(rows, 2, 0.0)
        expected = torch.stack([rows[labels == i].mean(0) for i in range(2)])
        torch.testing.assert_close(tuned.parts["visual.pixels"][1].shared.prototypes, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(model(image=pictures, text=ids)[0], model(pictures, ids)[0])
    with raises(UnsupportedSite, method="dam_vp", expected=("logits",)):
        attach(model, "dam_vp", head_free=True)


def test_counts() -> None:
    site = PixelSite(name="p", role="pixels", port=Port("", "in"), size=(224, 224, 3), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert DAMVP(clusters=1).count(site) == 69_840
    assert DAMVP(clusters=5).count(site) == 5 * 69_840
    assert attach(tiny(), "dam_vp", clusters=5).report().trainable == 5 * 3 * (32 * 48 - 24 * 36)


def test_incompatible_arguments_are_rejected_with_a_message() -> None:
    wrong = ({"clusters": 0}, {"threshold": -1.0}, {"samples": 0}, {"border": 112}, {"std": -1.0}, {"classes": -1})
    for options in wrong:
        ((option, given),) = options.items()
        with raises(OptionError, method="dam_vp", option=option, given=given):
            DAMVP(**options)
    with raises(OptionError, method="dam_vp", option="classes", given=3, expected=0):
        DAMVP(classes=3)
    with raises(UnsupportedSite, method="dam_vp", expected=("features",)):
        attach(tiny(), "dam_vp", where="pixels")
    with raises(UnsupportedSite, method="dam_vp", expected=("pixels",)):
        attach(tiny(), "dam_vp", where="features")
    with raises(UnsupportedSite, method="dam_vp", option="classes", given=25, expected=24):
        attach(tiny(), "dam_vp", head_free=True, classes=25)
    model = tiny()
    tuned = attach(model, "dam_vp")
    with raises(OptionError, method="prepare", option="batches", given=0):
        tuned.prepare([])
    with tuned.enabled(False), raises(StateError, where="dam_vp", given="disabled"):
        tuned.prepare([(normal(raw()), torch.zeros(2))])
    assert not tuned.parts["pixels"][1].shared.capturing
