"""Runs with several datasets, concepts and validation photos: files, resume, records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from veneer.pipelines.generate import concepts_in_file, words_for_base
from veneer.pipelines.personalize import PersonalizeConfig, personalize

from tests.raising import raises
from tests.training.images import save
from veneer import base_models
from veneer.cli import main
from veneer.formats import load_all
from veneer.injection.errors import OptionError
from veneer.testing.pipelines import tiny_pipeline
from veneer.training.data.image_io import DataError
from veneer.training.report.progress import read_progress

QUICK: dict[str, Any] = {
    "steps": 2,
    "eval_seeds": 0,
    "features": "bundled",
    "tracker": "none",
    "prompts": ("a {concept}",),
    "template": ("a {concept}",),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a saved tiny Stable Diffusion that samples in few steps."""
    folder = tmp_path_factory.mktemp("base") / "sd"
    tiny_pipeline("sd").save_pretrained(folder)
    (folder / "veneer.json").write_text('{"steps": 2}')
    return str(folder)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Folders with three images of a toy and of a cup, and two class images."""
    for start, (name, count) in enumerate({"toys": 3, "cups": 3, "bears": 2}.items()):
        for i in range(count):
            save(tmp_path / name / f"{i}.png", 48, 40, seed=10 * start + i)
    return {name: str(tmp_path / name) for name in ("toys", "cups", "bears")}


def tables(folders: dict[str, str]) -> tuple[dict[str, Any], ...]:
    return (
        {
            "path": folders["toys"],
            "concept": "<toy>",
            "class_word": "cat",
            "template": ["{a|one} {concept}"],
            "resolution": [32, 64],
        },
        {"path": folders["cups"], "concept": "<cup>", "class_word": "dog", "repeats": 2, "flip": 0.5},
        {"path": folders["bears"], "class_word": "bird", "regularization": True},
    )


def run(base: str, folders: dict[str, str], out: Path, **settings: Any) -> Path:
    options = {"datasets": tables(folders), **QUICK, **settings}
    return personalize(PersonalizeConfig(base=base, out=out, **options))


def equal_files(one: Path, other: Path) -> bool:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert "adapter.safetensors" in files
    pairs = [(load_file(one / name), load_file(other / name)) for name in files]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def test_two_concepts_are_trained_and_saved_in_one_file(base: str, folders: Any, tmp_path: Path, capsys: Any) -> None:
    out = run(base, folders, tmp_path / "out", method="pivotal", eval_seeds=2, drift_prompts=("a car", "a bird"))
    pipe = base_models.load(base)
    table = pipe.text_encoder.get_input_embeddings().weight
    starts = {w: table[pipe.tokenizer.encode(w, add_special_tokens=False)].mean(0) for w in ("cat", "dog")}
    learned = load_file(out / "learned_embeds.safetensors")
    assert learned.keys() == {"<toy>", "<cup>"}
    for token, word, other in (("<toy>", "cat", "dog"), ("<cup>", "dog", "cat")):
        vector = learned[token].reshape(-1, table.shape[1])[0]
        moved, away = (vector - starts[word]).norm(), (vector - starts[other]).norm()
        assert 0 < moved < away, "trained, from its own class word"
    attached = load_all(pipe, out / "adapter.safetensors")
    assert {a.method.name for a in attached} == {"lora", "textual_inversion"}
    assert {"<toy>", "<cup>"} <= pipe.tokenizer.get_vocab().keys()
    assert concepts_in_file(out) == {"<toy>": "cat", "<cup>": "dog"}
    assert words_for_base(out) == {"<toy>": "cat", "<cup>": "dog"}

    record = json.loads((out / "result.json").read_text())
    assert record["metrics"] is None
    assert [each["token"] for each in record["concepts"]] == ["<toy>", "<cup>"]
    for each, other in zip(record["concepts"], ("<cup>", "<toy>"), strict=True):
        assert each["photos"] == 3
        assert each["metrics"]["similarity"]["adapted"]["n"] == 2
        assert each["confusion"].keys() == {other}
        assert each["token"] in record["verdict"]["summary"]
        assert each["verdict"]["outcome"] in ("learned", "partly", "not_learned", "overfitted", "unknown")
    assert record["phase_seconds"]["evaluating"] > 0
    shown = capsys.readouterr()
    assert "16/16" in shown.err, "two concepts and two other prompts, two seeds, adapted and base"
    assert "<toy>:" in shown.out
    assert (out / "before_after.png").is_file()


def test_stop_and_resume_of_a_mixture(base: str, folders: Any, tmp_path: Path) -> None:
    """Two datasets at three resolutions with class images, wildcards and validation: five steps, and two steps then three."""
    settings = {"method": "pivotal", "checkpoint_every": 1, "validation_share": 0.3, "validation_every": 2}
    whole = run(base, folders, tmp_path / "whole", steps=5, **settings)
    run(base, folders, tmp_path / "parts", steps=2, **settings)
    parts = run(base, folders, tmp_path / "parts", steps=5, resume=True, **settings)
    assert equal_files(whole, parts)
    one, other = (json.loads((each / "result.json").read_text())["validation"] for each in (whole, parts))
    assert [score["step"] for score in one] == [0, 2, 4, 5]
    assert one == other


def test_validation_has_no_effect_on_the_weights_but_by_its_share(base: str, folders: Any, tmp_path: Path) -> None:
    """A folder for validation leaves the run as it is, with dropout; a share changes the photos."""
    settings = {"options": {"lora": {"dropout": 0.3}}, "steps": 3}
    plain = run(base, folders, tmp_path / "plain", **settings)
    measured = run(base, folders, tmp_path / "measured", validation=Path(folders["bears"]), validation_every=1, **settings)
    share = run(base, folders, tmp_path / "share", validation_share=0.4, **settings)
    assert equal_files(plain, measured)
    assert not equal_files(plain, share)
    assert not (plain / "loss.png").exists()
    assert (measured / "loss.png").is_file()
    record = json.loads((measured / "result.json").read_text())
    assert [score["step"] for score in record["validation"]] == [0, 1, 2, 3]
    assert len({score["validation_loss"] for score in record["validation"]}) > 1
    assert [event.step for event in read_progress(measured / "progress.jsonl")][-1] == 3


def test_the_tracker_has_the_validation_loss(base: str, folders: Any, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    out = run(base, folders, tmp_path / "out", tracker="tensorboard", validation_share=0.3, validation_every=1)
    log = events.EventAccumulator(str(next((out / "logs").rglob("events*")).parent))
    log.Reload()
    scores = json.loads((out / "result.json").read_text())["validation"]
    for tag, key in (("validation_loss", None), ("validation_loss/<cup>", "<cup>")):
        found = [(event.step, event.value) for event in log.Scalars(tag)]
        values = [s["validation_loss_by_concept"][key] if key else s["validation_loss"] for s in scores]
        assert found == [(s["step"], pytest.approx(value)) for s, value in zip(scores, values, strict=True)]


def test_class_images_are_generated_for_each_concept(base: str, folders: Any, tmp_path: Path) -> None:
    out = run(base, folders, tmp_path / "out", class_images=2)
    prompts = []
    for path in sorted((out / "prior").glob("*.png")):
        with Image.open(path) as image:
            prompts.append(json.loads(image.info["veneer.prior"])["prompt"])
    assert {prompt.partition(" ")[0] for prompt in prompts[:2]} <= {"a", "one"}
    assert [prompt.partition(" ")[2] for prompt in prompts] == ["cat", "cat", "dog", "dog"]


def test_the_config_of_a_run_repeats_it(base: str, folders: Any, tmp_path: Path) -> None:
    out = run(base, folders, tmp_path / "out", method="pivotal")
    assert main(["personalize", "--config", str(out / "config.toml"), "--out", str(tmp_path / "again")]) == 0
    assert equal_files(out, tmp_path / "again")


def test_one_dataset_is_the_run_with_its_photos(base: str, folders: Any, tmp_path: Path) -> None:
    settings = {"method": "pivotal", "class_images": 1}
    one = run(
        base,
        folders,
        tmp_path / "one",
        datasets=({"path": folders["toys"], "concept": "<toy>", "class_word": "cat"},),
        **settings,
    )
    photos = {"photos": Path(folders["toys"]), "concept": "<toy>", "class_word": "cat", "datasets": ()}
    assert equal_files(one, run(base, folders, tmp_path / "photos", **photos, **settings))


def test_ordinary_words_get_placeholders_in_their_own_captions(base: str, folders: Any, tmp_path: Path, capsys: Any) -> None:
    (Path(folders["cups"]) / "0.txt").write_text("my vase on a table")
    own = (
        {"path": folders["toys"], "concept": "dog", "class_word": "animal"},
        {"path": folders["cups"], "concept": "vase", "class_word": "vase"},
    )
    out = run(base, folders, tmp_path / "out", method="textual_inversion", datasets=own)
    assert load_file(out / "learned_embeds.safetensors").keys() == {"<dog>", "<vase>"}
    assert concepts_in_file(out) == {"<dog>": "animal", "<vase>": "vase"}
    shown = capsys.readouterr().out
    assert "token is <dog>" in shown
    assert "token is <vase>" in shown
    assert "captions without" not in shown


def test_errors_of_datasets_leave_no_folder(base: str, folders: Any, tmp_path: Path) -> None:
    for i in range(3):
        (Path(folders["cups"]) / f"{i}.txt").write_text("a white thing")
    with raises(DataError, where="concept", expected="<cup>"):
        run(base, folders, tmp_path / "out")
    same = ({"path": folders["toys"], "concept": "My Cup"}, {"path": folders["bears"], "concept": "my cup"})
    with raises(OptionError, option="concept", given=("My Cup", "my cup")):
        run(base, folders, tmp_path / "out", method="textual_inversion", datasets=same)
    with raises(OptionError, option="class_word", where="<cup>"):
        run(
            base,
            folders,
            tmp_path / "out",
            class_images=1,
            datasets=(tables(folders)[0], {"path": folders["bears"], "concept": "<cup>"}),
        )
    assert not (tmp_path / "out").exists()
