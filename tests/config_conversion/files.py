"""Configs in the layouts of other trainers, with folders of small photos that a run can read.

Layouts: kohya-ss/sd-scripts, docs/config_README-en.md and docs/train_network.md; ostris/ai-toolkit, config/examples.
"""

from __future__ import annotations

from pathlib import Path

from tests.training.images import save

TWO_SUBJECTS = """
[general]
caption_extension = ".txt"
enable_bucket = true
shuffle_caption = true
keep_tokens = 1
flip_aug = true
color_aug = false

[[datasets]]
resolution = 64
batch_size = 2
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 8
bucket_no_upscale = true
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "{root}/first"
  class_tokens = "zwx lamp"
  num_repeats = 3

  [[datasets.subsets]]
  image_dir = "{root}/second"
  class_tokens = "qvf table lamp"
  keep_tokens = 3
  random_crop = true

  [[datasets.subsets]]
  image_dir = "{root}/lamps"
  class_tokens = "lamp"
  is_reg = true
"""
"""Two concepts and class images; values of a subset win over its dataset, and these over general."""
TAGS = """
[general]
resolution = [64, 64]
flip_aug = false

[[datasets]]
batch_size = 1
caption_extension = "txt"
shuffle_caption = true
caption_tag_dropout_rate = 0.2
caption_dropout_rate = 0.1
caption_dropout_every_n_epochs = 5
keep_tokens_separator = "|||"
secondary_separator = ";;;"
enable_wildcard = true
validation_split = 0.34

  [[datasets.subsets]]
  image_dir = "{root}/first"
  class_tokens = "zwx"
  caption_prefix = "zwx |||"
  caption_suffix = ", photo ||| sharp"
  color_aug = true
  face_crop_aug_range = [1.0, 3.0]
  my_own_key = 7
"""
"""Tags with separators and wildcards."""
RESOLUTIONS = """
[[datasets]]
resolution = 64
batch_size = 2
  [[datasets.subsets]]
  image_dir = "{root}/first"
  class_tokens = "zwx lamp"
  caption_extension = ".txt"

[[datasets]]
resolution = [128, 96]
batch_size = 1
skip_image_resolution = 16
  [[datasets.subsets]]
  image_dir = "{root}/first"
  class_tokens = "zwx lamp"
  caption_extension = ".txt"

[[datasets]]
resolution = 64
  [[datasets.subsets]]
  image_dir = "{root}/second"
  metadata_file = "{root}/second.json"
  caption_extension = ".txt"
"""
"""One folder at two resolutions, and photos with captions of other things."""
ARGUMENTS = """
[model]
pretrained_model_name_or_path = "some/base"
v_parameterization = true
[data]
dataset_config = "two_subjects.toml"
[network]
network_module = "networks.lora"
network_dim = 6
network_alpha = 2
network_args = ["conv_dim=2", "conv_alpha=1", "rank_dropout=0.1"]
[training]
output_dir = "results"
output_name = "lamps"
save_model_as = "safetensors"
save_precision = "fp16"
save_every_n_epochs = 1
learning_rate = 1e-3
unet_lr = 2e-3
text_encoder_lr = 5e-4
optimizer_type = "AdamW"
optimizer_args = ["weight_decay=0.05", "betas=0.9,0.99"]
lr_scheduler = "cosine"
lr_warmup_steps = 0.1
max_train_steps = 20
max_train_epochs = 10
gradient_accumulation_steps = 2
gradient_checkpointing = true
mixed_precision = "no"
min_snr_gamma = 5
noise_offset = 0.05
seed = 42
clip_skip = 2
sdpa = true
cache_latents = true
cache_latents_to_disk = true
prior_loss_weight = 0.5
loss_type = "huber"
"""
JOB = """
job: extension
config:
  name: lamp_v1
  process:
    - type: sd_trainer
      training_folder: results
      device: cuda:0
      trigger_word: zwx
      network: {{type: lora, linear: 4, linear_alpha: 2, conv: 2, conv_alpha: 1}}
      save: {{dtype: float16, save_every: 250, max_step_saves_to_keep: 4, push_to_hub: false}}
      datasets:
        - folder_path: "{root}/first"
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [64, 128]
        - folder_path: "{root}/lamps"
          is_reg: true
          default_caption: a lamp
          resolution: 64
          num_repeats: 2
          flip_x: true
          flip_y: true
      train:
        batch_size: 1
        steps: 2
        gradient_accumulation_steps: 1
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: ddpm
        optimizer: adamw
        optimizer_params: {{weight_decay: 0.001, eps: 1.0e-6}}
        lr: 1e-4
        linear_timesteps: true
        ema_config: {{use_ema: true, ema_decay: 0.99}}
        dtype: fp32
      model: {{name_or_path: some/base, is_xl: false}}
      sample:
        sampler: ddpm
        sample_every: 250
        width: 1024
        prompts: ["[trigger] on a table", "a lamp in the rain", "zwx at night"]
        neg: ""
        seed: 42
        guidance_scale: 4
meta: {{name: "[name]", version: "1.0"}}
"""
SECOND_JOB = """
job: extension
config:
  name: lamp_v2
  process:
    - type: sd_trainer
      network: {{type: lokr, linear: 4, linear_alpha: 4, lokr_factor: 4, lokr_full_rank: true}}
      datasets:
        - folder_path: "{root}/second"
          resolution: [64]
          token_dropout_rate: 0.1
          random_crop: true
          my_dataset_key: 1
      train:
        batch_size: 2
        steps: 2
        lr: 1e-3
        optimizer: prodigy_plus
        timestep_type: sigmoid
        lr_scheduler: constant
        dtype: fp32
      model: {{name_or_path: some/base}}
"""
"""Without a trigger word: the captions have it."""


def photo_folders(root: Path) -> Path:
    """Folders of photos that the configs name: captions of `first` have `zwx`, those of `second` have `qvf`."""
    for start, (name, tags) in enumerate(
        {"first": "zwx lamp, a table;;;wood, {{red|blue}}", "second": "qvf table lamp, dark"}.items()
    ):
        for i in range(3):
            save(root / name / f"{i}.png", 72, 64, seed=10 * start + i)
            (root / name / f"{i}.txt").write_text(tags.replace("{{", "{").replace("}}", "}"))
    for i in range(2):
        save(root / "lamps" / f"{i}.png", 64, 64, seed=90 + i)
    return root


def write(root: Path, name: str, text: str) -> Path:
    """A config file beside the folders."""
    path = root / name
    path.write_text(text.replace("{root}", str(root)).replace("{{", "{").replace("}}", "}"))
    return path
