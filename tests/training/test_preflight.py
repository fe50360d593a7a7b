"""Preflight checks on a real tiny pipeline, with one mistake at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import veneer
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.photo_folder import Photo
from veneer.training.families import family
from veneer.training.loop.config import TrainConfig
from veneer.training.preflight import checks, estimates
from veneer.training.preflight.preflight import PreflightError, preflight
from veneer.training.report.previews import PreviewSettings

RUN = TrainConfig(steps=200, learning_rate=1e-3, batch=2, tracker="none")


def photos(count=4, size=(64, 80), **fields):
    return [Photo(Path(f"{i}.jpg"), str(i), size, **fields) for i in range(count)]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd")


@pytest.fixture(scope="module")
def kind(pipe):
    return family(pipe)


@pytest.fixture(scope="module")
def lora(pipe):
    return veneer.attach(pipe, "lora", rank=4)


def concerns(lora, kind, config=RUN, images=None, concept="<toy>", **options):
    """(about, severity) of each concern, and the text."""
    options = {"resolution": 32, **options}
    found = preflight([lora], config, photos() if images is None else images, kind, concept, **options)
    return [(c.about, c.severity) for c in found.concerns], found.text()


def test_a_correct_run_reports_parameters_and_cost(lora, kind, tmp_path):
    state, before = torch.get_rng_state(), [p.detach().clone() for p in lora.parameters()]
    found = preflight(
        [lora], replace(RUN, ema=0.9, checkpoint_every=5), photos(), kind, "<toy>", resolution=32, folder=tmp_path / "new"
    )
    assert not found.errors
    assert not found.warnings
    found.check()
    assert str(lora.report()) in found.text()
    assert "photos: 4, the smallest 80×64; resolution 32; each is used about 100 times in 200 steps of 2" in found.text()
    values = sum(p.numel() for p in lora.parameters())
    cost = found.estimate
    assert cost.training == values * (4 + 8 + 4 + 8)  # gradient, two moments, average, the last good weights and average
    assert cost.checkpoint == values * (4 + 8 + 4)
    parts = (kind.tower, kind.pipe.text_encoder, kind.pipe.vae)
    sizes = [t.numel() * t.element_size() for part in parts for t in (*part.parameters(), *part.buffers())]
    assert cost.base == sum(sizes)
    assert cost.measured
    assert cost.seconds > 0
    assert cost.activations > values * 4
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, lora.parameters(), strict=True))
    assert all(p.grad is None for p in lora.parameters())


def test_counted_from_shapes_is_near_the_measured(lora, kind):
    measured, counted = (
        preflight([lora], RUN, photos(), kind, "<toy>", resolution=32, measure=measure).estimate for measure in (True, False)
    )
    assert not counted.measured
    assert counted.activations == pytest.approx(measured.activations, rel=0.5)
    assert counted.base == measured.base


@pytest.mark.parametrize(
    ("rate", "optimizer", "said"),
    [(1e-3, "adamw", ""), (1e-4, "adamw", ""), (0.1, "adamw", "100 times above the default of lora, 0.001"),
     (1e-6, "adamw8bit", "1000 times below the default of lora, 0.001"), (0.1, "prodigy", ""), (0.1, "sgd", "")],
)  # fmt: skip
def test_learning_rate_far_off_for_the_method(lora, rate, optimizer, said):
    found = list(checks.learning_rates([lora], replace(RUN, learning_rate=rate, optimizer=optimizer)))
    assert [said in c.message for c in found] == ([True] if said else [])


def test_learning_rate_of_a_group_counts_for_its_method(lora):
    groups = [{"params": list(lora.parameters()), "lr_scale": 0.01}]
    assert [c.about for c in checks.learning_rates([lora], RUN, groups)] == ["learning rate"]
    assert not list(checks.learning_rates([lora], replace(RUN, learning_rate=0.1), groups))


def test_the_default_rate_of_a_preset_overrides_that_of_the_method(lora):
    far = replace(RUN, learning_rate=0.1)
    assert not list(checks.learning_rates([lora], far, default_rates={"lora": 0.05}))
    (told,) = checks.learning_rates([lora], replace(RUN, learning_rate=1e-3), default_rates={"lora": 0.05})
    assert "50 times below the default of lora, 0.05" in told.message


def test_three_photos_of_90_pixels(lora, kind):
    found, text = concerns(lora, kind, images=photos(3, (90, 90)), resolution=144)
    assert ("photos", "warning") in found
    assert "3 of 3 are smaller than the resolution of 144 and will be enlarged up to 1.6 times" in text
    assert "0.jpg (90×90)" in text


@pytest.mark.parametrize(
    ("images", "about"),
    [
        (photos(2), [("photos", "warning")]),
        ([], [("photos", "error")]),
        (photos(3, is_prior=True), [("photos", "error")]),
        (photos(3), []),
    ],
)
def test_too_few_photos(images, about):
    assert [(c.about, c.severity) for c in checks.images(images, 32, "<toy>")] == about


def test_copies_and_captions_without_the_concept():
    images = [replace(p, digest="same") for p in photos(3, caption="a photo of a dog")]
    messages = [c.message for c in checks.images(images, 32, "<toy>")]
    assert len(messages) == 2
    assert "3 copies of one image" in messages[0]
    assert "captions without the concept '<toy>'" in messages[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [({}, ""), ({"steps": 10}, "5 times, which is too little training"), ({"steps": 10_000}, "overfits to the photos"),
     ({"warmup": 200}, "the warm-up of 200 steps does not end within 200 steps")],
)  # fmt: skip
def test_too_few_or_too_many_steps(changes, said):
    found = list(checks.steps(replace(RUN, **changes), photos()))
    assert [said in c.message for c in found] == ([True] if said else [])


@pytest.mark.parametrize(
    ("concept", "severity", "said"),
    [("<toy>", None, ""), ("zorblax", None, ""), ("zorblax dog", None, ""), ("dog", "warning", "'dog' is a common word"),
     ("red dog", "warning", "'red dog' is a common word"),
     ("<|endoftext|>", "error", "a special token of the tokenizer"), (" ", "error", "set it")],
)  # fmt: skip
def test_concept_word(lora, kind, concept, severity, said):
    found = list(checks.concept_word([lora], kind, concept, photos()))
    assert [c.severity for c in found] == ([severity] if severity else [])
    assert all(said in c.message for c in found)


def test_token_that_the_tokenizer_already_has(lora, kind):
    kind.pipe.tokenizer.add_tokens(["<had>"])
    found = list(checks.concept_word([lora], kind, "<had>", photos()))
    assert ["already has the token '<had>'" in c.message for c in found] == [True]


def test_new_tokens_must_hold_the_concept():
    pipe = tiny_pipeline("sd")
    words = veneer.attach(pipe, "textual_inversion", tokens="<new>", initialize="dog")
    assert not list(checks.concept_word([words], family(pipe), "<new>", photos()))
    (concern,) = checks.concept_word([words], family(pipe), "<other>", photos())
    assert concern.severity == "error"
    assert "'<other>' contains none of the new tokens, '<new>'" in concern.message


def test_a_prompt_that_is_too_long(pipe, lora):
    long = "a dog " * 60
    (concern,) = checks.prompts(family(pipe), ["a dog", long, long])
    assert concern.severity == "error"
    assert "has 122 tokens, above the text encoder's limit of 77: shorten it" in concern.message
    (concern,) = checks.prompts(family(pipe, truncate="warn"), [long])
    assert concern.severity == "warning"
    found = preflight([lora], RUN, photos(caption=long + "<toy>"), family(pipe), "<toy>", resolution=32)
    assert found.estimate is None
    with pytest.raises(PreflightError) as caught:
        found.check()
    assert [concern.about for concern in caught.value.given] == ["prompt"]


def test_a_class_that_the_base_does_not_have():
    dit = family(tiny_pipeline("dit"))
    assert not list(checks.prompts(dit, ["duck"]))
    (concern,) = checks.prompts(dit, ["duk"])
    assert concern.severity == "error"
    assert "Similar names: duck" in concern.message


def test_resolution(lora, kind):
    assert [c.severity for c in checks.side(33, kind)] == ["error"]
    assert [c.severity for c in checks.side(320, kind)] == ["warning"]
    assert not list(checks.side(kind.resolution, kind))


def test_memory_and_disk_that_do_not_suffice():
    needs, has = {"memory": 2**31, "disk": 2**20}, {"memory": 2**30, "disk": 2**19}
    assert [str(c).split(";")[0] for c in checks.check_capacity(needs, has, certain=True)] == [
        "error: memory: the run needs about 2.00 GiB and 1.00 GiB are free: lower the batch or resolution, or use gradient "
        "checkpointing",
        "error: disk: the run needs about 1.0 MiB and 0.5 MiB are free: free space, choose a folder on another "
        "disk (--out), or write fewer checkpoints (--checkpoint-every)",
    ]
    assert not list(checks.check_capacity(needs, {"memory": None, "disk": 2**21}, certain=True))


def test_nothing_attached_is_an_error(kind):
    found = preflight([], RUN, photos(), kind, "<toy>", resolution=32)
    assert [c.about for c in found.errors] == ["sites"]
    assert "cost: unknown" in found.text()


@pytest.mark.parametrize("measure", [True, False])
def test_two_passes_of_a_batch_have_twice_the_activations(kind, pipe, measure, monkeypatch):
    """Both are in memory until the backward pass. The measured speed of a matrix product would vary, so it is a constant."""
    monkeypatch.setattr(estimates, "flops_per_second", lambda *_: 1e10)
    found = []
    for consistency in (0.0, 1.0):
        tuned = veneer.attach(pipe, "adamix", consistency=consistency)
        tuned.begin_pass(0, 0)
        found.append(preflight([tuned], RUN, photos(), kind, "<toy>", resolution=32, measure=measure).estimate)
        tuned.detach()
    one, two = found
    assert two.activations == 2 * one.activations > 0
    if not measure:
        assert two.seconds == pytest.approx(2 * one.seconds)


def test_the_estimate_is_of_the_whole_run(kind, lora):
    """Loading, training, previews and evaluation; and the disk of adapters and checkpoints."""
    settings = PreviewSettings(steps=10, guidance=3.0)
    plain = preflight([lora], RUN, photos(), kind, "<toy>", resolution=32).estimate
    found = preflight(
        [lora], RUN, photos(), kind, "<toy>", resolution=32, images=12, previews=4, sampling=settings, loading=7.0
    ).estimate
    assert plain is not None
    assert found is not None
    assert (found.images, found.loading) == (16, 7.0)
    assert found.image_seconds > 0
    assert found.total_seconds == pytest.approx(7 + found.steps * found.seconds + 16 * found.image_seconds)
    assert plain.total_seconds == pytest.approx(plain.steps * plain.seconds)
    values = sum(p.numel() for p in lora.parameters())
    assert found.written >= 8 * values
    assert found.written > plain.written
