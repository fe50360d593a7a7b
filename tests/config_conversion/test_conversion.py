"""Conversion of other trainers' configs: values, remarks on every other key, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from tests.config_conversion.files import ARGUMENTS, JOB, RESOLUTIONS, SECOND_JOB, TAGS, TWO_SUBJECTS, photo_folders, write
from tests.raising import raises
from veneer import OptionError, methods
from veneer.config_conversion import ConfigConversion, convert_file
from veneer.config_file import entries_of
from veneer.flags import values
from veneer.training.data.dataset_tables import dataset_tables
from veneer.training.personalization_config import PersonalizeConfig


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return photo_folders(tmp_path)


def remarks(conversion: ConfigConversion, kind: str) -> set[str]:
    return {remark.key for remark in conversion.remarks if remark.kind == kind}


def config_of(conversion: ConfigConversion) -> PersonalizeConfig:
    names = conversion.content.get("method", "lora").split("+")
    return PersonalizeConfig(
        **values(PersonalizeConfig, entries_of(conversion.content, PersonalizeConfig, {n: methods.get(n) for n in names}))
    )


def test_subsets_inherit_from_their_dataset_and_from_general(root: Path) -> None:
    found = convert_file(write(root, "two_subjects.toml", TWO_SUBJECTS))
    first, second, lamps = found.content["datasets"]
    assert first == {
        "path": f"{root}/first", "concept": "zwx", "class_word": "lamp", "template": ["{concept} lamp"], "repeats": 3,
        "keep_tokens": 2, "shuffle_tags": True, "caption_extension": ".txt", "flip": 0.5, "buckets": True, "min_side": 32,
        "max_side": 128, "upscale": False, "resolution": [64],
    }  # fmt: skip
    assert (second["concept"], second["class_word"], second["keep_tokens"], second["crop"]) == ("qvf", "table lamp", 3, "random")
    assert (lamps["regularization"], lamps["class_word"], lamps["concept"]) == (True, "lamp", "")
    assert found.content["batch"] == 2
    assert [(remark.kind, remark.key) for remark in found.remarks] == [("left_out", "datasets[0].bucket_reso_steps")]
    tables = dataset_tables(config_of(found))
    assert [table.captions().sample(None, 0, 0, 0, table.regularization) for table in tables] == [
        "zwx lamp",
        "qvf table lamp",
        "lamp",
    ]


def test_separators_wildcards_and_unknown_keys(root: Path) -> None:
    found = convert_file(write(root, "tags.toml", TAGS))
    (table,) = found.content["datasets"]
    expected = {
        "keep_tokens_separator": "|||", "secondary_separator": ";;;", "caption_prefix": "zwx |||", "caption_dropout": 0.1,
        "caption_suffix": ", photo ||| sharp", "tag_dropout": 0.2, "buckets": False, "resolution": [64],
        "caption_extension": ".txt",
    }  # fmt: skip
    assert expected.items() <= table.items()
    assert "flip" not in table
    assert found.content["validation_share"] == 0.34
    place = "datasets[0].subsets[0]."
    assert remarks(found, "unknown") == {f"{place}my_own_key"}
    assert remarks(found, "left_out") == {
        f"{place}color_aug", f"{place}face_crop_aug_range", "datasets[0].caption_dropout_every_n_epochs"
    }  # fmt: skip


def test_several_resolutions_and_batch_sizes(root: Path) -> None:
    found = convert_file(write(root, "resolutions.toml", RESOLUTIONS))
    assert [table["resolution"] for table in found.content["datasets"]] == [[64], [128], [64]]
    assert [table["concept"] for table in found.content["datasets"]] == ["zwx", "zwx", ""]
    assert remarks(found, "changed") == {"datasets[1].subsets[0].resolution", "datasets.batch_size"}
    assert remarks(found, "left_out") == {"datasets[1].skip_image_resolution", "datasets[2].subsets[0].metadata_file"}


def test_captions_of_sd_scripts_are_in_caption_files_by_default(root: Path) -> None:
    found = convert_file(write(root, "a.toml", f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{root}/first"\n'))
    assert found.content["datasets"][0]["caption_extension"] == ".caption"
    assert remarks(found, "missing") == {"concept"}


def test_training_arguments_and_their_dataset_config(root: Path) -> None:
    write(root, "two_subjects.toml", TWO_SUBJECTS)
    found = convert_file(write(root, "arguments.toml", ARGUMENTS))
    run = config_of(found)
    assert {
        "base": "some/base", "steps": 20, "batch": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
        "mixed_precision": "no", "min_snr_gamma": 5.0, "noise_offset": 0.05, "seed": 42, "cache": True, "prior_loss_weight": 0.5,
        "out": "results/lamps", "save_dtype": "float16", "method": "lora", "text_encoder": True, "learning_rate": 2e-3,
        "text_learning_rate": 5e-4, "optimizer": "adamw", "weight_decay": 0.05, "schedule": "cosine", "warmup": 2,
        "loss": "huber", "prediction": "v_prediction",
    }.items() <= found.content.items()  # fmt: skip
    assert found.content["lora"] == {"rank": 6, "alpha": 2.0, "by_site": {"conv.*": {"rank": 2, "alpha": 1.0}}}
    assert len(run.datasets) == 3
    assert run.optimizer_args == {"betas": "0.9,0.99"}
    assert remarks(found, "left_out") == {
        "network_args.rank_dropout", "save_every_n_epochs", "max_train_epochs", "clip_skip",
        "cache_latents_to_disk", "datasets[0].bucket_reso_steps",
    }  # fmt: skip
    assert remarks(found, "unknown") == set()


def test_every_argument_is_carried_over_or_reported(root: Path) -> None:
    """Each key alone: without it, the content or the remarks differ, except for keys that name a default."""
    write(root, "two_subjects.toml", TWO_SUBJECTS)
    flat = {k: v for table in tomlkit.parse(ARGUMENTS).unwrap().values() for k, v in table.items()} | {"brand_new": 3}
    silent = {"sdpa", "save_model_as", "network_module", "learning_rate", "text_encoder_lr", "unet_lr", "mixed_precision"}
    for key in flat.keys() - silent - {"pretrained_model_name_or_path"}:
        results = []
        for each in (flat, {k: v for k, v in flat.items() if k != key}):
            (root / "one.json").write_text(json.dumps(each))
            results.append(convert_file(root / "one.json"))
        assert (results[0].content, results[0].remarks) != (results[1].content, results[1].remarks), key
    (root / "one.json").write_text(json.dumps(flat))
    assert remarks(convert_file(root / "one.json"), "unknown") == {"brand_new"}


@pytest.mark.parametrize(
    ("arguments", "method", "options"),
    [
        ({"network_module": "networks.lora", "network_dim": 8}, "lora", {"rank": 8, "alpha": 1.0}),
        (
            {"network_module": "lycoris.kohya", "network_dim": 8, "network_alpha": 4, "network_args": ["algo=loha"]},
            "loha", {"rank": 8, "alpha": 4.0},
        ),
        (
            {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=6"], "network_dim": 8},
            "lokr", {"rank": 8, "alpha": 1.0, "factor": 6},
        ),
        ({"network_module": "networks.dylora", "network_dim": 8}, "lora", {"rank": 8, "alpha": 1.0}),
    ],
)  # fmt: skip
def test_networks_of_sd_scripts(root: Path, arguments: dict[str, Any], method: str, options: dict[str, Any]) -> None:
    (root / "one.json").write_text(json.dumps({**arguments, "network_train_unet_only": True}))
    found = convert_file(root / "one.json")
    assert found.content["method"] == method
    assert found.content[method] == options
    assert "text_encoder" not in found.content
    assert ("network_module" in remarks(found, "left_out")) == ("dylora" in arguments["network_module"])
    assert remarks(found, "missing") == {"datasets"}


def test_folders_of_images_by_repeats_and_class_tokens(root: Path) -> None:
    (root / "train").mkdir()
    (root / "first").rename(root / "train" / "4_zwx lamp")
    (root / "one.json").write_text(
        json.dumps({"network_dim": 4, "train_data_dir": "train", "reg_data_dir": "none", "resolution": "64,64"})
    )
    found = convert_file(root / "one.json")
    (table,) = found.content["datasets"]
    assert (table["repeats"], table["concept"], table["class_word"]) == (4, "zwx", "lamp")
    assert remarks(found, "left_out") == {"reg_data_dir"}


def test_a_job_of_ai_toolkit(root: Path) -> None:
    found = convert_file(write(root, "job.yaml", JOB))
    config_of(found)
    assert {
        "concept": "zwx", "base": "some/base", "method": "lora", "steps": 2, "batch": 1, "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True, "text_encoder": False, "learning_rate": 1e-4, "optimizer": "adamw", "weight_decay": 0.001,
        "optimizer_args": {"eps": 1e-6}, "ema": 0.99, "dtype": "float32", "mixed_precision": "no", "loss": "l2",
        "save_dtype": "float16", "checkpoint_every": 250,
        "preview_every": 250, "preview_scheduler": "ddpm", "out": "results/lamp_v1",
        "prompts": ["{concept} on a table", "{concept} a lamp in the rain", "{concept} at night"],
    }.items() <= found.content.items()  # fmt: skip
    assert found.content["lora"] == {"rank": 4, "alpha": 2.0, "by_site": {"conv.*": {"rank": 2, "alpha": 1.0}}}
    first, lamps = found.content["datasets"]
    assert first == {
        "path": f"{root}/first",
        "caption_extension": ".txt",
        "caption_dropout": 0.05,
        "shuffle_tags": False,
        "resolution": [64, 128],
    }
    assert (lamps["regularization"], lamps["repeats"], lamps["flip"], lamps["template"]) == (True, 2, 0.5, ["a lamp"])
    process = "config.process[0]."
    assert remarks(found, "left_out") == {
        "meta", f"{process}device", f"{process}save.max_step_saves_to_keep", f"{process}datasets[1].flip_y",
        f"{process}train.linear_timesteps", f"{process}sample.width",
        f"{process}sample.seed", f"{process}sample.guidance_scale",
    }  # fmt: skip
    assert remarks(found, "unknown") == set()


def test_the_trigger_word_is_put_before_captions_without_it(root: Path) -> None:
    (root / "first" / "1.txt").write_text("a lamp")
    found = convert_file(write(root, "job.yaml", JOB))
    assert found.content["datasets"][0]["caption_prefix"] == "{concept}"
    assert "config.process[0].datasets[0].trigger_word" in remarks(found, "changed")


def test_a_job_without_a_trigger_word(root: Path) -> None:
    found = convert_file(write(root, "job.yaml", SECOND_JOB))
    assert found.content["lokr"] == {"factor": 4}
    assert found.content["timestep_sampling"] == "sigmoid"
    assert remarks(found, "missing") == {"config.process[0].trigger_word"}
    assert remarks(found, "unknown") == {"config.process[0].datasets[0].my_dataset_key"}
    assert "config.process[0].train.optimizer" in remarks(found, "left_out")


@pytest.mark.parametrize(
    ("name", "text", "data"),
    [
        ("a.toml", "steps = 3\n", {"given": ("steps",)}),
        ("a.yaml", "config: {process: []}", {"where": "config.process"}),
        ("a.toml", "[[datasets]]\n[[datasets.subsets]]\nclass_tokens = 'a b'", {"where": "datasets[0].subsets[0].image_dir"}),
        ("a.json", "[1]", {"given": "list"}),
        ("a.json", "{", {"given": "unreadable"}),
        ("a.txt", "", {"given": ".txt"}),
    ],
)
def test_files_that_are_not_supported_are_errors(root: Path, name: str, text: str, data: dict[str, Any]) -> None:
    with raises(OptionError, **data):
        convert_file(write(root, name, text))
