"""Notes in the help texts of the commands, after the first line: files that a command reads and writes, and the next command."""

from __future__ import annotations

NOTES: dict[str, tuple[str, ...]] = {
    "personalize": (
        "Captions are text files beside the photos (`NAME.txt`), or rows of `metadata.jsonl` or `metadata.csv`; `--template` is "
        "for photos without one.",
        "The run folder has the adapter (`adapter.safetensors`, a LoRA also as `pytorch_lora_weights.safetensors` of diffusers), "
        "image grids, metrics (`result.json`) and the options (`config.toml`). `veneer generate` uses it, and `veneer convert` "
        "writes files for ComfyUI or A1111.",
        "The preset of a base model is its `veneer.json`, with training defaults and prompts; the bundled model has one.",
        "`--method pez` writes no adapter but a prompt of ordinary words (`prompt.txt`), in 500 steps by default. Beside its own "
        "options it uses `--base`, `--features` (its CLIP), `--steps`, `--learning-rate`, `--weight-decay`, `--batch`, `--seed` "
        "and `--out`.",
    ),
    "transfer": (
        "The weights of the epoch that `--keep-epoch` selects are saved. The run folder has the adapter with the head "
        "(`adapter.safetensors`), test accuracy and other metrics (`result.json`), plots and the options (`config.toml`). "
        "`veneer predict` classifies images with it, and `veneer export` writes a model that needs no veneer.",
        "With `--tasks` the tasks share one adapter, except that `hyperformer` and `hyperformer_plus_plus` generate one for each "
        "task. `veneer predict --task NAME` selects a task.",
    ),
    "compare": (
        "Trains each row once per seed and prints a table of test accuracy (mean ± half a 95 % interval over seeds), trainable "
        "parameters, time and memory, which is also in `compare.md`. `veneer transfer --method NAME --help` shows the options of "
        "a method.",
        "Several numbers of `--shots` give few-shot curves, in `few_shot.md`, `few_shot.json` and `few_shot.png`. "
        "`--base-to-new` gives the accuracy on base classes, on new classes and their harmonic mean, in `base_to_new.md` and "
        "`base_to_new.json`.",
    ),
    "search": (
        "A sub-network is a choice of methods and their sizes for each block; a trial evaluates one on the validation split. An "
        "evolutionary search over `--trials` of them, as in NOAH, chooses the best, which is trained as `veneer transfer` does "
        "and evaluated once on the test split. The model needs blocks and a new head: vision models of timm and transformers, or "
        "`bundled`.",
        "With `--space noah`, the supernet is trained once, and a trial is a pass over the validation images; with `blocks` and "
        "`s4`, each trial is a training run of `--trial-epochs`.",
        "The run folder has the trials (`trials.jsonl`), the Pareto front (`search.md`, `pareto.png`), and the run of the chosen "
        "combination (`best`), whose `config.toml` repeats it by `veneer transfer --config`. A stopped search continues with "
        "`--config FOLDER/config.toml --resume --out FOLDER`.",
    ),
    "predict": ("Prints one line per image on stdout: its most probable classes with their probabilities.",),
    "export": ("Class names and preprocessing are in the folder, or in a `.json` file beside the graph.",),
    "analyze": ("`veneer analyze heads --help` shows what the command measures and writes, and its flags.",),
    "analyze heads": (
        "A pattern is what a head reads: class and register tokens or one token (vertical), each patch and the adjacent ones "
        "(diagonal), a wider neighborhood (block), or none of these (heterogeneous).",
        "Disables each head in two ways, by equal attention to all tokens and by zero, and measures a classifier by accuracy and "
        "loss, a diffusion model by the relative change of its prediction. This takes two passes over the images, or over the "
        "recorded inputs of the denoiser, for each head.",
        "Writes `heads.json` (patterns and changes), `importance.png` (changes by layer and head), `maps.png` (mean attention "
        "maps) and, for a diffusion model with a CLIP tokenizer, `words.png` (where the image reads each word of the first "
        "prompt). `veneer transfer --method head_pruning` prunes heads.",
    ),
    "prompts": ("The flags are shown by `veneer prompts similarity --help`, and in the same way for the other commands.",),
    "prompts similarity": (
        "Prints a line for each pair, the most similar one first. `veneer transfer --init-from FILE` trains the prompts of "
        "another task from those of FILE, with the same model, method and options.",
    ),
    "prompts spot": (
        "Trains a prompt on the task for a few steps, and ranks the library by the cosine similarity of its average tokens. The "
        "folder has the most similar prompt, or the average of several, for `veneer transfer --init-from`; a new head is not in "
        "it, so that the classes may be others.",
    ),
    "prompts transfer": (
        "The prompt of another model passes through a projector, which is trained by the loss of the task (by default), by its "
        "distance to prompts of other tasks (`--distance`), or is that of an earlier transfer (`--projector`). The prompt of the "
        "same model is used as it is.",
        "Prints the test accuracy with the transferred prompt, with a random prompt and without one, and the optimizer steps "
        "that the transferred prompt saves as the initial one.",
    ),
    "control": (
        "A control adapter makes images follow a map, such as edges, or an example image. The flags are shown by "
        "`veneer control train --help` and `veneer control generate --help`.",
    ),
    "control train": (
        "The adapter makes images follow a map, such as edges, or an example image. The run folder has it "
        "(`adapter.safetensors`, also for diffusers, or as ControlNeXt's files), with image grids, metrics "
        "(`result.json`) and the options (`config.toml`). `veneer control generate` uses it.",
        "The preset of a base model is its `veneer.json`, with training defaults; the bundled model has one.",
    ),
    "control generate": ("Each control adapter needs a photo (`--image`) or a map (`--map`).",),
    "convert": ("Each ΔW of the new file is compared with that of the old one. `veneer resize` changes rank or dtype.",),
    "convert-config": (
        "Prints every key that is not carried over as it is, with the reason. The file is for `veneer personalize --config`.",
    ),
    "merge": (
        "The result is an adapter file; no base model is changed.",
        "`--rank`, `--energy`, `--error`, `--cumulative`, `--ratio`, `--density`, `--base`, `--to` and `--dtype` are options of "
        "the methods that write one LoRA. Native files are those that training commands write: `adapter.safetensors` of a run "
        "folder.",
    ),
    "extract": ("Differences outside the chosen sites are printed and left out.",),
    "push": ("Log in first: `hf auth login`, or set HF_TOKEN.",),
    "sites": (
        "A site is a place where a method can act, such as the weight of a layer. `--where` selects sites by their role in the "
        "list, such as `attn.q`, also with braces, `*`, a tower or blocks: `attn.{q,v}`, `text/attn.*`, `mlp@6:12`; or by name: "
        "`name:blocks.3.*`.",
    ),
    "bench": (
        "Measures the implementations of a row in turn, and prints the ratios of their time and memory to those of the reference "
        "of the row. Comparisons with peft need the package peft.",
    ),
    "inspect": ("Prints the format, the family of the base model, and the methods, layers, ranks and parameters of each block.",),
    "methods": (
        "The table has a row for each method and a column for each host: ✓ if all models of the host support the method, the "
        "names of model families if some do, – if none does.",
        "`veneer personalize --method NAME --help` or `veneer transfer --method NAME --help` shows the options of a method.",
    ),
    "hosts": ("A host names the layers of a model family by their roles. `veneer methods` lists the methods for each.",),
    "examples": (
        "They are two subjects for `veneer personalize` (`octopus`, with captions, and `sneaker`), handwritten digits in ten "
        "classes for `veneer transfer` (`digits`), and digits without labels for `veneer predict` (`new`).",
    ),
    "app": ("Its pages do what the commands do. Ctrl+C stops the app; a running job continues.",),
    "pretrain-base": (
        "Downloads and renders training data, then trains, packages and evaluates the models. Each stage resumes from its files "
        "in the folder `--work`.",
    ),
}
"""Command to the paragraphs of its note."""


def description_of(command: str, text: str) -> str:
    """The first line of a help text, and the note of the command."""
    return "\n\n".join((text, *NOTES.get(command, ())))
