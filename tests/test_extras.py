"""Installation in parts: the core and timm alone, and errors that name the missing extra."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.raising import raises
from veneer.extras import EXTRAS, advice, require
from veneer.injection.errors import MissingExtra

ROOT = Path(__file__).resolve().parents[1]
CORE_AND_TIMM = {"timm", "torchvision", "yaml"}  # timm requires torchvision and PyYAML
SSF = """
import timm, torch, veneer

model = timm.create_model("test_vit", num_classes=3)
torch.manual_seed(0)
images, labels = torch.randn(8, 3, *model.pretrained_cfg["input_size"][1:]), torch.arange(8) % 3
tuned = veneer.attach(model, "ssf", train=("head",))
optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-3)
losses = []
for _ in range(20):
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    losses.append(loss.item())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0], losses
model.eval()
expected = model(images)
file = tuned.save("ssf")
tuned.detach()
veneer.load(model, file)
assert torch.equal(model(images), expected)
print("trained, saved and loaded")
"""


def without_extras(code: str, folder: Path, kept: set[str]) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which the libraries of all extras but `kept` cannot be imported or found."""
    blocked = sorted(set(EXTRAS) - kept)
    prelude = f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    return subprocess.run([sys.executable, "-c", prelude + code], cwd=folder, capture_output=True, text=True)


def test_the_core_and_timm_train_and_save_ssf(tmp_path: Path) -> None:
    done = without_extras(SSF, tmp_path, CORE_AND_TIMM)
    assert done.stdout == "trained, saved and loaded\n", done.stderr


def test_a_missing_extra_is_an_error_that_names_it(tmp_path: Path) -> None:
    """All in one process, because each start of Python with torch takes seconds."""
    extra_of = {
        "veneer.base_models.load()": "diffusers",
        "import veneer.classification": "train",
        "import veneer.training.loop.trainer": "train",
        "import veneer.control": "train",
        "import veneer.apps": "app",
    }
    code = (
        "import json, veneer\n"
        f"for code in {[*extra_of]!r}:\n"
        "    try: exec(code)\n"
        "    except Exception as error:\n"
        "        kind = type(error)\n"
        "        print(json.dumps([code, f'{kind.__module__}.{kind.__name__}', str(error)]))\n"
    )
    done = without_extras(code, tmp_path, set())
    assert done.returncode == 0, done.stderr
    errors = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(code, kind) for code, kind, _ in errors] == [(code, "veneer.injection.errors.MissingExtra") for code in extra_of]
    assert [code for code, _, message in errors if f'pip install "veneer[{extra_of[code]}]"' not in message] == []


def test_a_command_names_the_missing_extra_without_a_traceback(tmp_path: Path) -> None:
    run = "from veneer.cli import main; sys.exit(main(['transfer', 'digits']))"
    done = without_extras(run, tmp_path, set())
    assert done.returncode == 1
    assert 'pip install "veneer[train]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_help_needs_no_extra(tmp_path: Path) -> None:
    done = without_extras("from veneer.cli import main; main(['personalize', '--help'])", tmp_path, set())
    assert done.returncode == 0, done.stderr


def test_require() -> None:
    require("timm", "torchvision")
    with raises(MissingExtra, library="cv3"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer.extras.EXTRAS", {"cv3": "base"})
        require("cv3")
    assert advice("numpy") == ""
    assert "veneer[diffusers]" in advice("transformers.models")


def test_every_library_is_in_its_extra() -> None:
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    distributions = {**packages_distributions(), "tensorboard": ["tensorboard"]}
    brought = {"starlette", "pandas", "tokenizers"}  # by gradio and transformers
    for module, extra in EXTRAS.items():
        names = {re.split(r"[<>=\[]", line)[0].replace("_", "-").lower() for line in extras[extra]}
        known = {name.replace("_", "-").lower() for name in distributions.get(module, [])}
        assert module in brought or not known or known & names, (module, extra)
