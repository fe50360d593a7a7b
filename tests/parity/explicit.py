"""Methods whose reference is written out in their test file, with the reason why no oracle was run."""

from __future__ import annotations

NO_CODE = "no code is public"
BASE = "trains tensors of the base model as they are"

EXPLICIT = {
    "bitfit": BASE,
    "ciat": "the authors' code is for TensorFlow",
    "delta_lora": NO_CODE,
    "full": BASE,
    "hadamard": NO_CODE,
    "linear_probe": BASE,
    "lion": NO_CODE,
    "lora_sparse": NO_CODE,
    "norm_tuning": BASE,
    "prompt_tuning": "the authors' code is for JAX",
    "tiny_attention": NO_CODE,
    "y_tuning": NO_CODE,
}
"""Method to the reason. The tests are in `tests/methods/test_NAME.py`."""
