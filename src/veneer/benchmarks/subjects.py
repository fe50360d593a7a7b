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

from veneer import bases
from veneer.formats import load_all
from veneer.training import targets
from veneer.training.features import features
from veneer.training.folder import find_photos
from veneer.training.metrics import Figure, figure, measure
from veneer.training.outcome import reduced, write_image
from veneer.training.photos import read_photo
from veneer.training.previews import Pair, PreviewSettings, pairs
from veneer.training.sheets import Row, sheet

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


def draw_again(out: Path) -> list[Pair]:
    """The pictures by which a finished run was judged, the same ones."""
    config = json.loads((out / "result.json").read_text())["config"]
    pipe = bases.load(config["base"])
    targets.freeze(pipe)
    attached = load_all(pipe, out)
    preset, concept = bases.preset(config["base"]), config["concept"]
    settings = PreviewSettings(
        tuple(range(config["eval_seeds"])), preset.steps, preset.guidance_scale, preset.negative_prompt, batch=4
    )
    prompts = [p.replace("{concept}", concept) for p in config["prompts"]]
    return pairs(pipe, attached, prompts, settings, {concept: config["class_word"]})


def judge_again(data: Path, out: Path, model: str) -> dict[str, Any]:
    """Likeness of a finished run's pictures by another feature model."""
    kept = out / f"likeness-{Path(model).name}.json"
    if not kept.is_file():
        config = json.loads((out / "result.json").read_text())["config"]
        drawn = draw_again(out)
        photos = [reduced(read_photo(p.path), drawn[0].adapted.width) for p in find_photos(data)]
        figures = measure(features(model), photos, drawn, (), {config["concept"]: config["class_word"]})
        kept.write_text(json.dumps(figures.as_dict()))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def together(
    data: Path, work: Path, subject: str, methods: Sequence[str], seed: int, rows: Sequence[dict[str, Any]]
) -> Image.Image:
    """One sheet of a subject: photos, the base's pictures, and a line a method with its gain over the seeds."""
    drawn = {method: draw_again(work / f"{subject}-{method}-{seed}") for method in methods}
    first = next(iter(drawn.values()))
    photos = [read_photo(p.path) for p in find_photos(data / subject)]
    lines = [Row("photos", (tuple(photos[: len(first)]),)), Row("the base, asked for the class", (tuple(p.base for p in first),))]
    for row in rows:
        if row["subject"] == subject:
            label = f"{row['method']}: {row['parameters']:,} numbers, likeness {_cell(row['base'])} -> {_cell(row['adapted'])}"
            lines.append(Row(label.replace("±", "+-"), (tuple(p.adapted for p in drawn[row["method"]]),)))
    prompts = ", ".join(f'"{prompt}"' for prompt in dict.fromkeys(p.prompt for p in first))
    return sheet(lines, title=f"{subject}, method by method", note=f"{prompts}; seed {seed}", cell=128)


def collected(
    data: Path, work: Path, subjects: Sequence[str], methods: Sequence[str], seeds: Sequence[int], also: str
) -> list[dict[str, Any]]:
    """One row a subject and method, each figure with its interval over seeds."""
    rows = []
    for subject in subjects:
        for method in methods:
            folders = [work / f"{subject}-{method}-{seed}" for seed in seeds]
            found = [json.loads((folder / "result.json").read_text()) for folder in folders]
            again = [judge_again(data / subject, folder, also) for folder in folders]
            second = {f"also_{k}": v for k, v in _likeness(again)}
            rows.append({"subject": subject, "method": method, "seeds": len(found), **dict(_figures(found)), **second})
    return rows


def _likeness(figures: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
    for side in ("base", "adapted", "gain"):
        yield side, figure([f["likeness"][side]["mean"] for f in figures])
    yield "ceiling", figure([f["ceiling"]["mean"] for f in figures])


def _figures(results: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    yield from _likeness([r["figures"] for r in results])
    yield "drift", figure([r["figures"]["drift"]["mean"] for r in results])
    yield "seconds", figure([r["training"]["seconds"] for r in results])
    yield "parameters", sum(m["parameters"] for m in results[0]["methods"])


def table(rows: Sequence[dict[str, Any]], names: tuple[str, str]) -> str:
    """A Markdown table: by each feature model the likeness of the base's pictures, of the adapted ones, and the gain."""
    heads = ["subject", "method", "trained values"]
    heads += [f"{word} ({name})" for name in names for word in ("base", "adapted", "gain", "ceiling")]
    heads += ["drift", "seconds"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        shown = [row[start + key] for start in ("", "also_") for key in ("base", "adapted", "gain", "ceiling")]
        cells = [row["subject"], row["method"], f"{row['parameters']:,}", *map(_cell, [*shown, row["drift"]])]
        cells.append(f"{row['seconds'].mean:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Figure) -> str:
    """The mean, and the half width of the interval where it is not nothing."""
    half = 0.0 if value.high is None else value.high - value.mean
    return f"{value.mean:.3f} ± {half:.3f}" if half >= 0.0005 else f"{value.mean:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and write the table and the sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with one folder of photos a subject")
    parser.add_argument("--work", type=Path, default=Path("runs/subjects"), help="where the runs go")
    parser.add_argument("--out", type=Path, help="where table and sheets go; none to only make the runs")
    parser.add_argument("--subjects", nargs="+", default=list(CLASS_WORDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--features", default="shipped", help="image model of the figures, as for `veneer personalize`")
    parser.add_argument("--also", default="shipped", help="a second one")
    parser.add_argument("--base", default="shipped", help="as for `veneer personalize`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--name", default="subjects", help="of the table's file")
    parser.add_argument("--together", action="store_true", help="one sheet a subject with a line a method, not one for each")
    given = parser.parse_args(arguments)
    run_all(given.data, given.work, given.subjects, given.methods, given.seeds, features=given.features, base=given.base)
    if given.out:
        rows = collected(given.data, given.work, given.subjects, given.methods, given.seeds, given.also)
        shown = table(rows, (Path(given.features).name, Path(given.also).name))
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{given.name}.md").write_text(shown + "\n")
        for subject in given.subjects:
            if given.together:
                one = together(given.data, given.work, subject, given.methods, given.seeds[0], rows)
                write_image(one.quantize(256).convert("RGB"), given.out / f"{subject}-{given.name}.png")
                continue
            for method in given.methods:
                with Image.open(given.work / f"{subject}-{method}-{given.seeds[0]}" / "before_after.png") as page:
                    write_image(page.quantize(256).convert("RGB"), given.out / f"{subject}-{method}.png")
        print(shown)


if __name__ == "__main__":
    main()
