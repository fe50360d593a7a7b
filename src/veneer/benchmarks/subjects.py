"""How much is learnt of real subjects: subjects × methods × seeds on one base, likeness against the base's own pictures.

Each run is `veneer personalize` with its own seed and its own pictures; the interval in the table is over seeds, so it says how
much another run would differ. Runs that are there already are not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from veneer.training.metrics import Figure, figure
from veneer.training.outcome import write_image

METHODS = ("lora", "textual_inversion", "pivotal")
CLASS_WORDS = {"duck_toy": "toy", "dog3": "dog", "monster_toy": "toy"}
"""Folder -> the class that the DreamBooth dataset gives it; its pictures by the base are what likeness is compared with."""

PROMPTS = ("a {concept}", "a picture of a {concept}", "a {concept}, center", "a large {concept}, center")
"""Prompts that leave the surroundings open, because likeness to a photo takes in all of it."""


def run_all(
    data: Path, work: Path, subjects: Sequence[str], methods: Sequence[str], seeds: Sequence[int], **settings: Any
) -> None:
    """Make the runs that are missing; `settings` go to every one."""
    from veneer.pipelines.personalize import PersonalizeConfig, personalize

    for seed in seeds:
        for subject in subjects:
            for method in methods:
                out = work / f"{subject}-{method}-{seed}"
                if not (out / "result.json").is_file():
                    word = CLASS_WORDS.get(subject, "")
                    concept = f"<{subject.replace('_', '-')}>"
                    personalize(
                        PersonalizeConfig(
                            photos=data / subject,
                            concept=concept,
                            class_word=word,
                            method=method,
                            seed=seed,
                            prompts=PROMPTS,
                            eval_seeds=2,
                            tracker="none",
                            out=out,
                            **settings,
                        )
                    )


def collected(work: Path, subjects: Sequence[str], methods: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row a subject and method, each figure with its interval over seeds."""
    rows = []
    for subject in subjects:
        for method in methods:
            found = [json.loads((work / f"{subject}-{method}-{seed}" / "result.json").read_text()) for seed in seeds]
            rows.append({"subject": subject, "method": method, "seeds": len(found), **dict(_figures(found))})
    return rows


def _figures(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    for side in ("base", "adapted", "gain"):
        yield f"likeness_{side}", figure([r["figures"]["likeness"][side]["mean"] for r in results])
    for name in ("ceiling", "drift"):
        yield name, figure([r["figures"][name]["mean"] for r in results])
    yield "seconds", figure([r["training"]["seconds"] for r in results])
    yield "parameters", sum(m["parameters"] for m in results[0]["methods"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table."""
    heads = ("subject", "method", "trained", "likeness, base", "likeness", "gain", "ceiling", "drift", "seconds")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        shown = [row[k] for k in ("likeness_base", "likeness_adapted", "likeness_gain", "ceiling", "drift")]
        cells = [row["subject"], row["method"], f"{row['parameters']:,}", *map(_cell, shown), f"{row['seconds'].mean:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Figure) -> str:
    return (
        f"{value.mean:.3f}"
        if value.low is None or value.high is None
        else f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and write the table and one sheet a subject and method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with one folder of photos a subject")
    parser.add_argument("--work", type=Path, default=Path("runs/subjects"), help="where the runs go")
    parser.add_argument("--out", type=Path, help="where table and sheets go; none to only make the runs")
    parser.add_argument("--subjects", nargs="+", default=list(CLASS_WORDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--features", default="shipped", help="image model of the figures, as for `veneer personalize`")
    parser.add_argument("--base", default="shipped", help="as for `veneer personalize`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args(arguments)
    run_all(given.data, given.work, given.subjects, given.methods, given.seeds, features=given.features, base=given.base)
    if given.out:
        rows = collected(given.work, given.subjects, given.methods, given.seeds)
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "subjects.md").write_text(table(rows) + "\n")
        for subject in given.subjects:
            for method in given.methods:
                with Image.open(given.work / f"{subject}-{method}-{given.seeds[0]}" / "before_after.png") as sheet:
                    write_image(sheet.quantize(256).convert("RGB"), given.out / f"{subject}-{method}.png")
        print(table(rows))


if __name__ == "__main__":
    main()
