"""`veneer transfer` and `veneer predict` on small models: learning, files, resume, and predictions in a new process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from veneer.pipelines.predict import PredictConfig, predict
from veneer.pipelines.transfer import transfer

from tests.classification.small import CLASSES, image_folder, model_folder
from tests.pipelines.blank_plots import rendered_plots
from tests.raising import raises
from veneer.classification.config import TransferConfig
from veneer.classification.predict import Predictor, open_predictor
from veneer.classification.train.epoch_selection import read_epochs
from veneer.injection import VeneerError
from veneer.injection.errors import OptionError, SelectionError, UnknownName, UnknownOption, UnsupportedSite
from veneer.methods.selective.structures.head_pruning import HeadPruning
from veneer.training.data.image_io import DataError
from veneer.training.loop.checkpoints import CheckpointError
from veneer.training.loop.trainer import Trainer
from veneer.training.preflight.preflight import PreflightError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("pictures"), count=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {kind: model_folder(parent, kind) for kind in ("vit", "resnet")}


def config(pictures: Path, model: Path, out: Path, **options: Any) -> TransferConfig:
    usual: dict[str, Any] = {"epochs": 3, "batch": 8, "augment": "none", "workers": 1, "test": 0.25}
    return TransferConfig(data=str(pictures), model=str(model), out=out, **{**usual, **options})


def read(path: Path, predictor: Predictor) -> torch.Tensor:
    with Image.open(path) as picture:
        return predictor.view(picture.convert("RGB"))


def result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, pictures: Path, models: dict[str, Path]) -> Path:
    """A run of LoRA that learns the colors."""
    out = tmp_path_factory.mktemp("run") / "lora"
    with rendered_plots():
        return transfer(config(pictures, models["vit"], out, epochs=12, learning_rate=2e-2))


def test_colors_are_learned_and_all_files_are_written(taught: Path) -> None:
    found = result(taught)
    names = {p.name for p in taught.iterdir()}
    assert names >= {
        "adapter.safetensors", "result.json", "model.json", "splits.json", "confusion.png", "curves.png", "mistakes.png",
    }  # fmt: skip
    assert not [name for name in names if name.startswith(("checkpoint", "best", "curve.json"))]
    assert found["val_accuracy"] >= 0.8
    assert found["test_accuracy"] >= 0.8
    assert found["verdict"]["outcome"] == "learned"
    assert len(found["verdict"]["reasons"]) == 3, "frequent class, linear probe, training accuracy"
    low, high = found["test_interval_95"]
    assert low <= found["test_accuracy"] <= high
    assert found["stored_bytes"] == (taught / "adapter.safetensors").stat().st_size
    assert found["data"]["classes"] == list(CLASSES)
    assert found["data"]["pictures"] == {"train": 30, "validation": 6, "test": 12}
    assert sum(map(sum, found["test"]["confusion"])) == 12
    rank, width = 8, 24
    assert found["trainable_parameters"] == 2 * 4 * rank * 2 * width + 3 * (width + 1), "LoRA on q, k, v, out of 2 blocks; a head"
    for name in ("confusion.png", "curves.png", "mistakes.png"):
        with Image.open(taught / name) as picture:
            assert picture.size[0] > 200
            assert picture.mode == "RGBA", "rendered"


def test_the_epoch_is_the_one_with_the_best_validation_accuracy(taught: Path) -> None:
    found = result(taught)
    best = max(found["epochs"], key=lambda e: (e["val_accuracy"], -e["val_loss"], -e["step"]))
    assert found["chosen"] == best
    assert found["val_accuracy"] == best["val_accuracy"]


def test_a_new_process_answers_as_the_run_did(taught: Path, pictures: Path) -> None:
    table = json.loads((taught / "splits.json").read_text())
    tested = [pictures / name for name, _, _ in table["test"]]
    start = "import sys; from veneer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", start, "predict", str(taught), *map(str, tested), "--format", "json", "--top", "1"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    answers = [json.loads(line) for line in lines]
    right = sum(a["label"] == label for a, (_, label, _) in zip(answers, table["test"], strict=True))
    assert right / len(tested) == result(taught)["test_accuracy"]
    here = list(open_predictor(taught).predict(tested, top=1))
    assert [(a["label"], a["probability"]) for a in answers] == [(h.label, h.probability) for h in here]


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("vit", "lora", {}),
        ("vit", "linear_probe", {}),
        ("vit", "full", {}),
        ("resnet", "bitfit", {}),
        ("resnet", "full", {"batch_norm": "moving"}),
        ("resnet", "full", {"weights": "none"}),
        ("vit", "vpt+lora+ssf", {}),
        ("vit", "y_tuning", {}),
        ("vit", "ilm_vp", {}),
        ("vit", "evp", {"head": "fresh", "where": ("pixels",)}),
        ("bundled_clip", "lora", {"where": ("attn",)}),
        ("bundled_clip", "coop", {}),
        ("bundled_clip", "clip_adapter", {}),
        ("bundled_clip", "tip_adapter", {}),
        ("bundled_clip", "tip_adapter", {"options": {"tip_adapter": {"train_keys": True, "views": 2}}, "shots": 4}),
        ("bundled_clip", "zero_shot", {}),
    ],
)
def test_saved_equals_loaded_on_a_fresh_head(
    tmp_path: Path, pictures: Path, models: dict[str, Path], kind: str, method: str, options: dict[str, Any], monkeypatch: Any
) -> None:
    """The same test logits from a model built anew with another random head: bitwise, or to rounding after cached features."""
    from veneer.classification.objectives import single_label

    kept: dict[str, torch.Tensor] = {}
    drawn = single_label.write_mistakes

    def keep(logits: torch.Tensor, *rest: Any) -> None:
        kept["logits"] = logits
        drawn(logits, *rest)

    monkeypatch.setattr(single_label, "write_mistakes", keep)
    model = models.get(kind, Path(kind))
    out = transfer(config(pictures, model, tmp_path / "run", method=method, epochs=2, learning_rate=1e-2, **options))
    record = json.loads((out / "model.json").read_text())
    assert record["fresh_head"] == (kind != "bundled_clip" and method != "ilm_vp")
    if options.get("weights") != "none":
        (out / "model.json").write_text(json.dumps({**record, "seed": 99}))  # another head is drawn
    predictor = open_predictor(out)
    table = json.loads((out / "splits.json").read_text())
    views = [read(pictures / name, predictor) for name, _, _ in table["test"]]
    got = torch.cat([predictor.logits(torch.stack(views[i : i + 8])) for i in range(0, len(views), 8)])
    if result(out)["training"]["cached_features"]:  # in other batch sizes than the predictor's: other matrix kernels
        close = 1e-5 * float(kept["logits"].abs().max())
        torch.testing.assert_close(got, kept["logits"], rtol=0, atol=close)
    else:
        assert torch.equal(got, kept["logits"])
    if kind == "resnet" and (options.get("batch_norm") == "moving" or options.get("weights") == "none"):
        assert any(key.endswith("running_mean") for key in load_file(out / "adapter.safetensors")), (
            "the statistics are in the file"
        )


@contextlib.contextmanager
def stopping_after(step: int) -> Iterator[None]:
    """Runs stop at the end of a step."""
    report = Trainer._report

    def stopping(self: Trainer, *rest: Any) -> None:
        report(self, *rest)
        if self.step == step:
            self.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_report", stopping)
        yield


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4, "cutmix": 1.0, "ema": 0.9, "class_weights": "balanced"}], ids=str)
def test_a_stopped_run_resumes_bitwise(tmp_path: Path, pictures: Path, models: dict[str, Path], options: dict[str, Any]) -> None:
    shared = {"method": "adaptformer", "epochs": 4, "augment": "flip", "patience": 3}
    whole = config(pictures, models["vit"], tmp_path / "whole", **shared, **options)
    transfer(whole)
    half = dataclasses.replace(whole, out=tmp_path / "half")

    with stopping_after(3):
        transfer(half)
    assert not (tmp_path / "half" / "result.json").exists(), "stopped in its second epoch"
    kept, best = (load_file(tmp_path / "half" / name) for name in ("adapter.safetensors", "best.safetensors"))
    assert len(read_epochs(tmp_path / "half")) == 1
    assert all(any(torch.equal(tensor, other) for other in kept.values()) for tensor in best.values()), "the first epoch's, whole"
    assert next(open_predictor(tmp_path / "half").predict([pictures / "red" / "0.png"])).label
    transfer(dataclasses.replace(half, resume=True))
    a, b = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "half"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = result(tmp_path / "whole"), result(tmp_path / "half")
    assert first["epochs"] == second["epochs"]
    assert [asdict(epoch) for epoch in read_epochs(tmp_path / "half")] == second["epochs"]
    assert first["test"] == second["test"]
    assert second["training"]["resumed_from"] == 4, "the step after the one that it was told to stop in"


def test_a_run_on_random_weights_resumes_on_the_same_model_only(tmp_path: Path, pictures: Path, models: dict[str, Path]) -> None:
    """Random weights have no hash, and another model of the same shapes would load the adapter."""
    run = config(pictures, models["vit"], tmp_path / "run", method="bitfit", weights="none")
    with stopping_after(3):
        transfer(run)
    other = shutil.copytree(models["vit"], tmp_path / "other")
    with raises(CheckpointError, given={"model": str(models["vit"])}, expected={"model": str(other)}):
        transfer(dataclasses.replace(run, model=str(other), resume=True))


def test_a_head_is_trained_on_features_that_are_computed_once(
    tmp_path: Path, pictures: Path, models: dict[str, Path], monkeypatch: Any
) -> None:
    import timm

    passes: list[int] = []
    forward = timm.models.vision_transformer.VisionTransformer.forward_features

    def counted(self: Any, x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        passes.append(len(x))
        return forward(self, x, *rest, **more)

    monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, "forward_features", counted)
    out = transfer(config(pictures, models["vit"], tmp_path / "probe", method="linear_probe", epochs=5))
    assert sum(passes) == 48, "each image once, in five epochs, validation and test"
    assert result(out)["training"]["cached_features"]


def test_the_average_of_the_weights_is_what_is_evaluated_and_saved(
    tmp_path: Path, pictures: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the weights after 1, 2 and 3 steps without averaging, with the decays 0, 2/11 and 3/12 of the warm-up."""
    from veneer.training.loop.trainer import Trainer

    steps: list[dict[str, torch.Tensor]] = []
    report = Trainer._report

    def keep(self: Trainer, *rest: Any) -> None:
        steps.append({name: tensor.detach().clone() for name, tensor in self.named.items()})
        report(self, *rest)

    monkeypatch.setattr(Trainer, "_report", keep)
    options = {"method": "adaptformer", "schedule": "constant", "warmup": 0.0, "steps": 3}
    plain, averages = (
        load_file(transfer(config(pictures, models["vit"], tmp_path / str(ema), **options, ema=ema)) / "adapter.safetensors")
        for ema in (0.0, 0.9)
    )
    first, second, third = steps[:3]
    assert plain.keys() == third.keys() == averages.keys()
    for name, tensor in averages.items():
        assert torch.equal(plain[name], third[name])
        average = 2 / 11 * first[name] + 9 / 11 * second[name]
        torch.testing.assert_close(tensor, 3 / 12 * average + 9 / 12 * third[name])
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_mixed_images_are_not_replaced_by_cached_features(tmp_path: Path, pictures: Path, models: dict[str, Path]) -> None:
    out = transfer(config(pictures, models["vit"], tmp_path / "probe", method="linear_probe", epochs=1, mixup=0.2))
    assert not result(out)["training"]["cached_features"]


def test_adapters_train_and_the_base_does_not(tmp_path: Path, pictures: Path, models: dict[str, Path]) -> None:
    """Dropout of the adapter is active; batch statistics of the base model are unchanged and not saved."""
    tensors = []
    for dropout in (0.0, 0.5):
        options = {"lora": {"dropout": dropout}}
        out = transfer(config(pictures, models["resnet"], tmp_path / str(dropout), epochs=1, options=options))
        tensors.append(load_file(out / "adapter.safetensors"))
    assert any(not torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert not [name for name in tensors[0] if "running_" in name]


def test_a_finished_run_is_not_overwritten(taught: Path, pictures: Path, models: dict[str, Path]) -> None:
    before = (taught / "adapter.safetensors").read_bytes()
    with raises(VeneerError, file=taught, where="out", given="finished"):
        transfer(config(pictures, models["vit"], taught))
    assert transfer(config(pictures, models["vit"], taught, resume=True)) == taught, "nothing is left to do"
    assert (taught / "adapter.safetensors").read_bytes() == before


def test_shots_and_a_search_on_validation(tmp_path: Path, pictures: Path, models: dict[str, Path]) -> None:
    out = transfer(
        config(pictures, models["vit"], tmp_path / "run", method="adaptformer", shots=4, search=9, search_epochs=1, batch=4)
    )
    trials = json.loads((out / "search.json").read_text())
    assert [t["round"] for t in trials] == [1] * 9 + [2] * 5 + [3] * 3 + [4] * 2
    assert [t["steps"] for t in trials] == [1] * 9 + [1] * 5 + [2] * 3 + [3] * 2, "27 steps of 3 a pass, in 4 equal rounds"
    tried = [(t["learning_rate"], t["options"].get("adaptformer", {}).get("scale", 0.1)) for t in trials]
    assert len(set(tried[:9])) == 9, "seven rates, and two at another scale"
    assert max(tried[:9])[0] == pytest.approx(1000 * min(tried[:9])[0])
    record = result(out)
    last = [(t["learning_rate"], t["options"]) for t in trials[-2:]]
    assert (record["config"]["learning_rate"], record["config"]["options"]) in last
    assert record["search"] == trials
    assert record["data"]["pictures"] == {"train": 12, "validation": 6, "test": 12}
    assert not (out / "search").exists()


def test_invalid_settings_are_errors_before_training(tmp_path: Path, pictures: Path, models: dict[str, Path]) -> None:
    for options, error, data in (
        ({"method": "loro"}, UnknownName, {"name": "loro", "kind": "method"}),
        ({"method": "lora", "options": {"vpt": {}}}, OptionError, {"option": "options", "given": ("vpt",)}),
        ({"where": ("attn.z",)}, SelectionError, {"pattern": "attn.z"}),
        ({"shots": 0}, OptionError, {"option": "shots", "given": 0}),
        ({"head": "new"}, OptionError, {"option": "head", "given": "new"}),
        ({"mixup": -0.1}, OptionError, {"option": "mixup", "given": -0.1}),
        ({"ema": 1.0}, OptionError, {"option": "ema", "given": 1.0}),
        ({"class_weights": "inverse"}, OptionError, {"option": "class_weights", "given": "inverse"}),
        ({"validation": 0.0}, DataError, {"where": "validation", "given": 0}),
    ):
        with raises(error, **data):
            transfer(config(pictures, models["vit"], tmp_path / "run", **options))
    with raises(UnknownOption, name="rnk", where="lora"):
        transfer(config(pictures, models["vit"], tmp_path / "run", method="lora", options={"lora": {"rnk": 3}}))
    with raises(UnsupportedSite, method="textual_inversion") as caught:
        transfer(config(pictures, models["vit"], tmp_path / "run", method="textual_inversion"))
    assert "clip_text" in caught.value.supported_hosts
    with raises(DataError, file=tmp_path / "nowhere", given="missing"):
        transfer(config(tmp_path / "nowhere", models["vit"], tmp_path / "run"))
    assert not list(tmp_path.rglob("adapter.safetensors"))


def test_unreadable_images_are_listed_and_skipped(
    tmp_path: Path, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_folder(tmp_path / "data", count=10)
    (data / "red" / "0.png").write_bytes(b"")
    (data / "blue" / "1.png").write_bytes((data / "blue" / "1.png").read_bytes()[:100])
    (data / "empty").mkdir()
    out = transfer(config(data, models["vit"], tmp_path / "run", epochs=1))
    told = capsys.readouterr().out
    assert "red/0.png" in told
    assert "blue/1.png" in told
    assert "empty" in told
    assert sum(result(out)["data"]["pictures"].values()) == 28


def test_a_prediction_reports_unreadable_images(taught: Path, pictures: Path, tmp_path: Path) -> None:
    good = pictures / "red" / "0.png"
    (tmp_path / "broken.png").write_bytes(b"no image")
    lines = list(predict(PredictConfig(taught, (good, tmp_path / "broken.png"), top=2)))
    assert lines[0].startswith(f"{good}: ")
    assert lines[0].count("%") == 2
    assert "broken.png" in lines[1]
    assert "remove or replace" in lines[1]
    rows = list(predict(PredictConfig(taught, (pictures / "red",), format="csv", top=1)))
    assert rows[0] == "image,label,probability,problem"
    assert len(rows) == 17
    with raises(VeneerError, where="images", given=(str(tmp_path / "broken.png"),)):
        list(predict(PredictConfig(taught, (tmp_path / "broken.png",))))
    with raises(VeneerError, file=tmp_path / "gone.png", given="missing"):
        list(predict(PredictConfig(taught, (tmp_path / "gone.png",))))
    with raises(VeneerError, file=tmp_path, where="model.json", given="missing"):
        list(predict(PredictConfig(tmp_path, (good,))))
    with raises(OptionError, option="format", given="xml"):
        PredictConfig(taught, (good,), format="xml")


def test_other_weights_under_a_taught_adapter_are_refused(tmp_path: Path, pictures: Path, models: dict[str, Path]) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "weights.safetensors"
    file.write_bytes((models["vit"] / "model.safetensors").read_bytes())
    out = transfer(config(pictures, models["vit"], tmp_path / "run", weights=str(file), epochs=1))
    assert open_predictor(out)
    folder = shutil.copytree(models["vit"], tmp_path / "model")
    of_folder = transfer(config(pictures, folder, tmp_path / "of-folder", method="linear_probe", epochs=1))
    assert open_predictor(of_folder)
    for changed, run, origin in ((file, out, file), (folder / "model.safetensors", of_folder, str(folder))):
        save_file({name: -tensor for name, tensor in load_file(changed).items()}, changed)
        with raises(VeneerError, file=origin, where="weights") as caught:
            open_predictor(run)
        assert caught.value.given != caught.value.expected
    file.unlink()
    with raises(VeneerError, file=file, where="weights", given="missing"):
        open_predictor(out)


def test_no_disk_space_is_an_error_before_training(
    tmp_path: Path, pictures: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.training.preflight.preflight.free_bytes", lambda folder: 2**16)
    with pytest.raises(PreflightError) as caught:
        transfer(config(pictures, models["vit"], tmp_path / "out"))
    assert [concern.about for concern in caught.value.given] == ["disk"]
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_the_file_of_a_pruned_model_has_the_heads_that_were_asked_for(
    tmp_path: Path, pictures: Path, models: dict[str, Path]
) -> None:
    """Also with averaged weights; without training to speak of, the epochs before the pruning are as accurate."""
    options = {"head_pruning": {"keep": 0.5, "warmup": 0.4, "final": 0.25, "every": 1}}
    settings: dict[str, Any] = {"method": "head_pruning", "options": options, "epochs": 4, "learning_rate": 1e-7, "ema": 0.99}
    out = transfer(config(pictures, models["vit"], tmp_path / "pruned", **settings))
    steps = [epoch.step for epoch in read_epochs(out)]
    end = HeadPruning(**options["head_pruning"]).schedule_end(steps[-1])
    assert steps[0] < end <= result(out)["chosen"]["step"]
    gates = torch.cat([t for key, t in load_file(out / "adapter.safetensors").items() if key.endswith(":gates")])
    assert (len(gates), int((gates != 0).sum())) == (4, 2)


def test_a_finished_run_of_adamix_has_one_expert_and_its_checkpoints_have_all(
    pictures: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("veneer.pipelines.transfer.tidy", lambda out: None)  # keeps the checkpoints
    options = {"adamix": {"bottleneck": 4}}
    out = transfer(config(pictures, models["vit"], tmp_path / "mix", epochs=1, method="adamix", options=options))
    shapes = {key: tuple(t.shape) for key, t in load_file(out / "adapter.safetensors").items() if key.endswith("branch:down")}
    assert {*shapes.values()} == {(1, 4, 24)}
    (checkpoint,) = out.glob("checkpoint*")
    stored = {k: t for file in checkpoint.glob("weights*.safetensors") for k, t in load_file(file).items()}
    assert {tuple(t.shape) for key, t in stored.items() if key.endswith("branch:down")} == {(4, 4, 24)}
