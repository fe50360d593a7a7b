"""Methods whose reference is written out in their test file, with the reason why no oracle was run."""

from __future__ import annotations

NO_CODE = "no code is public"
NOT_RUN = "the public code was not run"
BASE = "trains tensors of the base model as they are"

EXPLICIT = {
    "autoprompt": NOT_RUN,
    "bitfit": BASE,
    "ciat": "the authors' code is for TensorFlow",
    "dart": NOT_RUN,
    "delta_lora": NO_CODE,
    "difffit": "the authors' code is not public",
    "evp": NOT_RUN,
    "full": BASE,
    "hadamard": NO_CODE,
    "linear_probe": BASE,
    "lion": NO_CODE,
    "mpo": NOT_RUN,
    "norm_tuning": BASE,
    "null_prompt": NOT_RUN,
    "ppt": NOT_RUN,
    "prompt_tuning": "the authors' code is for JAX",
    "tiny_attention": NO_CODE,
    "y_tuning": NO_CODE,
}
"""Method to the reason. The tests are in `tests/methods/test_NAME.py`."""
