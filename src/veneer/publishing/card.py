"""Text of a model card: what the adapter is, how to use it, how it was trained, its scores and its limits."""

from __future__ import annotations

from collections.abc import Iterator

from veneer.training.report.png_metadata import SAMPLES
from veneer.training.report.verdict import WORDS, read_verdict
from veneer.version import __version__

from .card_data import TOKEN_FILE, CardFacts, dataset_label, front_matter
from .run_record import COMMANDS
from .tables import file_rows, score_rows, setting_rows, table
from .usage import usage_sections

KINDS = {"controlnet": "ControlNet", "t2i_adapter": "T2I-Adapter", "controlnext": "ControlNeXt", "ip_adapter": "IP-Adapter"}


def card_text(facts: CardFacts) -> str:
    """The content of `README.md`: front matter and text, as `huggingface_hub.ModelCard` joins them."""
    from huggingface_hub import ModelCard

    sections = [
        f"# {facts.title}\n\n{_summary(facts)}",
        *_trigger(facts),
        *_requires(facts),
        *_images(facts),
        "## How to use it\n\n" + "\n\n".join(usage_sections(facts)),
        *_scores(facts),
        "## Training\n\n" + table(("setting", "value"), setting_rows(facts.run)),
        "## Files\n\n" + table(("file", "size", "content"), file_rows(facts.files)),
        f"## License\n\n{_license(facts)}",
        "## Limitations\n\n" + "\n".join(f"- {text}" for text in _limitations(facts)),
    ]
    card = ModelCard(f"---\n{front_matter(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    return str(card)


def _summary(facts: CardFacts) -> str:
    run = facts.run
    methods = " + ".join(run.methods)
    if run.kind == "transfer":
        classes = run.record["data"]["classes"]
        shown = ", ".join(classes[:12]) + (", …" if len(classes) > 12 else "")
        return (
            f"An image classifier: {_base(facts)}, adapted with {methods} to {len(classes)} classes ({shown}). Trained on "
            f"{dataset_label(run)} with veneer {__version__}."
        )
    if run.kind == "control":
        kind = KINDS.get(run.method, run.method)
        return f"A {kind} for {_base(facts)}, conditioned on {run.config['condition']}. Trained with veneer {__version__}."
    photos = len(run.record.get("photos", ()))
    names = [f"`{each['token']}`" + (f" (a {each['class_word']})" if each.get("class_word") else "") for each in run.concepts]
    return (
        f"An adapter ({methods}) of {_base(facts)} for {' and '.join(names)}, trained on {photos} photo{'s' * (photos != 1)} "
        f"with veneer {__version__}."
    )


def _base(facts: CardFacts) -> str:
    run = facts.run
    if run.hub_base:
        return f"[{run.hub_base}](https://huggingface.co/{run.hub_base})"
    if run.is_bundled:
        return "veneer's bundled base model for 128-pixel images" if run.base == "bundled" else "veneer's bundled CLIP"
    return f"`{run.base_label}`" + ("" if run.kind == "transfer" else ", a base model that is not on the hub")


def _trigger(facts: CardFacts) -> Iterator[str]:
    tokens = facts.run.tokens
    if not tokens:
        return
    place = "It is a learned token: load the token embedding too."
    if len(tokens) > 1:
        place = "They are learned tokens: load the token embeddings too."
    shown = " or ".join(f"`{token}`" for token in tokens)
    yield f"## Trigger words\n\nUse {shown} in the prompt. {place if TOKEN_FILE in facts.files else ''}".rstrip()


def _requires(facts: CardFacts) -> Iterator[str]:
    rows = [(f"`{each.file.as_posix()}`", f"{each.scale:g}", f"`{each.sha256}`") for each in facts.run.fixed_adapters]
    if rows:
        text = "It was trained on top of other adapters, which are not in this repository. Load them too, at these strengths:"
        yield f"## Requires\n\n{text}\n\n" + table(("adapter", "strength", "SHA-256"), rows)


def _images(facts: CardFacts) -> Iterator[str]:
    grid = f"{SAMPLES}/grid.png"
    if grid in facts.files:
        yield f"## Images\n\n![The base model's images beside those with the adapter, from the same noise]({grid})"
    elif facts.run.samples:
        cells = [(each.get("prompt") or f"map ({each.get('map')})", each["file"]) for each in facts.run.samples]
        yield "## Images\n\n" + "\n".join(f"![{alt}]({file})" for alt, file in cells)
    plots = [name for name in ("confusion.png", "average_precision.png", "curves.png") if name in facts.files]
    if plots:
        yield "## Plots\n\n" + "\n".join(f"![{name.removesuffix('.png')}]({name})" for name in plots)


def _scores(facts: CardFacts) -> Iterator[str]:
    rows, note = score_rows(facts.run)
    if not rows:
        yield "## Scores\n\nThe run was not evaluated."
        return
    verdict = read_verdict(facts.run.record)
    lines = [
        table(("score", "value", "95 % interval"), rows),
        note,
        f"Verdict of the evaluation: {WORDS[verdict.outcome]}. {verdict.summary}",
    ]
    yield "## Scores\n\n" + "\n\n".join(lines)


def _license(facts: CardFacts) -> str:
    terms = f"The base model's license also applies: see {_base(facts)}."
    if facts.license:
        return f"`{facts.license}`. {terms}"
    return f"The author has set no license for this adapter: ask before you use or share it. {terms}"


def _limitations(facts: CardFacts) -> Iterator[str]:
    run = facts.run
    if run.kind == "transfer":
        yield "It knows only its classes: an image of something else is assigned to one of them."
        yield "The scores hold for images like those of the test split; measure it on your own."
        return
    yield f"It fits its base model only, {_base(facts)}, and has that model's biases and limits."
    if run.kind == "personalize":
        photos = len(run.record.get("photos", ()))
        yield f"It was trained on {photos} photo{'s' * (photos != 1)}: poses and places that they do not show may be worse."
        yield "Scores compare with the training photos by an image model, on the prompts above; they do not rate image quality."
    else:
        yield f"It expects conditions as in training: {run.config['condition']}, computed by `veneer`."
    yield f"Trained with `veneer {COMMANDS[run.kind]}`; no check for unsafe content was made."
