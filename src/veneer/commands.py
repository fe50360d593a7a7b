"""The commands: for each its name, its help and a function that adds its flags to a parser."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from veneer.command_line.examples import examples_text
from veneer.command_line.flag_groups import add_method_group
from veneer.command_line.notes import description_of
from veneer.command_line.output import add_output_flags, print_lines
from veneer.command_line.registry_listing import AddFlags, registry_command
from veneer.config_file import add_config_flags, entries_of, method_of, read_config, to_toml
from veneer.discovery import find_entries
from veneer.flags import about_of, add_flags, required_fields, values
from veneer.static_source import class_named, class_of
from veneer.training.method_names import split_methods


def check_command(parser: argparse.ArgumentParser, name: str, commands: Mapping[str, object]) -> None:
    """Rejects an unknown command, and names the most similar one."""
    if name and name not in commands:
        close = difflib.get_close_matches(name, commands, 1)
        parser.error(f"no command {name!r}{f'; did you mean {close[0]!r}?' if close else ''}")


def _training_command(function: str, config_name: str, *positional: str) -> AddFlags:
    """A command that trains methods, with the methods' options as flags."""

    def add(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        module = f"veneer.pipelines.{function}"
        config_class = class_of(module, config_name)
        file = read_config(arguments)
        names = _method_names(arguments, method_of(file, config_class.method))
        taken = add_flags(parser, config_class, positional=positional, skip=("options",), grouped=True)
        add_config_flags(parser)
        for name in names:
            method = _method_class(name)
            group = add_method_group(parser, name, about_of(method))
            taken |= add_flags(group, method, prefix=name, taken=taken)

        def run(namespace: argparse.Namespace) -> object:
            pipeline = importlib.import_module(module)
            from veneer import methods

            kind, classes = getattr(pipeline, config_name), {name: methods.get(name) for name in names}
            flags = _flags_over(entries_of(file, kind, classes), namespace)
            options = {name: values(method, flags, name) for name, method in classes.items()}
            config = kind(**values(kind, flags), options={n: o for n, o in options.items() if o})
            command = parser.prog.removeprefix("veneer ")
            return _run_or_print(command, config, getattr(pipeline, function), namespace)

        parser.set_defaults(run=run)

    return add


def _flags_over(entries: Mapping[str, Any], namespace: argparse.Namespace) -> dict[str, Any]:
    """Entries of a config file, and over them what the command line has; absent positional arguments are None or empty."""
    return {**entries, **{name: value for name, value in vars(namespace).items() if value not in (None, [])}}


def _run_or_print(command: str, config: Any, function: Callable[[Any], Any], namespace: argparse.Namespace) -> Any:
    """Calls the function of a command, or prints its config for `--print-config`."""
    if vars(namespace).get("print config"):
        if os.environ.get("RANK", "0") == "0":  # once for all processes of `accelerate launch`
            print(to_toml(command, config), end="")
        return None
    return function(config)


def _method_names(arguments: Sequence[str], default: str) -> list[str]:
    """The methods named by `--method`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--method", default=default)
    try:
        method = parser.parse_known_args(arguments)[0].method
    except argparse.ArgumentError:  # no value: the command's own parser reports it
        method = default
    return [] if method == "zero_shot" else split_methods(method)


def _method_class(method: str) -> Any:
    """The class of a method, or what `class_of` returns for it."""
    entry = next((entry for entry in find_entries("veneer.methods", "veneer.methods") if entry.name == method), None)
    found = class_named(entry) if entry else None
    if found is None:
        from veneer import methods

        return methods.get(method)
    return found


def _config_command(
    module: str,
    function: str,
    config_name: str,
    positional: Sequence[str] = (),
    prints_lines: bool = False,
    grouped: bool = False,
) -> AddFlags:
    """A command that calls a function with its config.

    Args:
        module: of `veneer.pipelines`, or with a dot of `veneer`.
        prints_lines: the function returns lines to print. `grouped`: list the flags by group.
    """

    def add(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        path = f"veneer.{module}" if "." in module else f"veneer.pipelines.{module}"
        file = read_config(arguments)
        # with two positional arguments, those in the file leave the words of the command line to the others
        fixed = [name for name in positional if name in file] if len(positional) > 1 else []
        add_flags(parser, class_of(path, config_name), positional=positional, skip=fixed, required=not file, grouped=grouped)
        add_config_flags(parser)

        def run(namespace: argparse.Namespace) -> object:
            pipeline = importlib.import_module(path)
            kind = getattr(pipeline, config_name)
            flags = _flags_over(entries_of(file, kind), namespace)
            _check_required(parser, kind, positional, flags)
            command = parser.prog.removeprefix("veneer ")
            result = _run_or_print(command, kind(**values(kind, flags)), getattr(pipeline, function), namespace)
            return print_lines(result or ()) if prints_lines else result

        parser.set_defaults(run=run)

    return add


def _check_required(parser: argparse.ArgumentParser, config: type, positional: Sequence[str], flags: Mapping[str, Any]) -> None:
    """Rejects a command line whose required arguments and flags are neither in it nor in its config file."""
    absent = [name for name in required_fields(config) if name not in flags]
    missing = [name if name in positional else f"--{name.strip('_').replace('_', '-')}" for name in absent]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")


def _command_group(**commands: tuple[str, AddFlags]) -> AddFlags:
    """A command with subcommands: for each its name, its help and a function that adds its flags."""

    def add(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
        subparsers = parser.add_subparsers(metavar="command", required=True)
        words = [word for word in arguments if not word.startswith("-")]
        subcommand, known = "".join(words[1:2]), [word for word in words[2:] if word in commands]
        if subcommand not in commands and known:
            parser.error(f"flags of {known[0]!r} belong after it: {parser.prog} {known[0]} …")
        check_command(parser, subcommand, commands)
        for name, (text, add_flags_of) in commands.items():
            full = f"{words[0]} {name}"
            about: dict[str, Any] = {"help": text, "description": description_of(full, text), "epilog": examples_text(full)}
            command = subparsers.add_parser(name, argument_default=argparse.SUPPRESS, **about)
            if name == subcommand:
                add_flags_of(command, arguments)
                add_output_flags(command)

    return add


def _sites(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    parser.add_argument(
        "base",
        help="a diffusion model: `bundled`, a diffusers folder, a .safetensors file or a hub name; or a vision model: a timm "
        "name, `hf:` and a folder or hub name of transformers, `bundled_clip` or `open_clip:NAME/TAG`",
    )
    parser.add_argument(
        "--peft",
        action="store_true",
        default=False,
        help="print the modules that LoRA trains by default in diffusers' scripts and peft, as values of --target-modules",
    )

    def run(namespace: argparse.Namespace) -> object:
        from veneer import base_models
        from veneer.classification.models.loading import build_without_weights
        from veneer.hosts._peer_targets import peer_targets
        from veneer.injection import sites

        model = build_without_weights(namespace.base) or base_models.load(namespace.base)
        lines = map(str, peer_targets(model)) if namespace.peft else [str(sites(model))]
        return print_lines([line for text in lines for line in text.splitlines()])

    parser.set_defaults(run=run)


COMMANDS: dict[str, tuple[str, AddFlags]] = {
    "personalize": (
        "fine-tune a diffusion model on a subject or style from a few photos",
        _training_command("personalize", "PersonalizeConfig", "photos"),
    ),
    "transfer": (
        "fine-tune a timm, open_clip or transformers model for image classification",
        _training_command("transfer", "TransferConfig", "data", "more_data"),
    ),
    "caption": (
        "write captions of photos by a captioning model or tagger",
        _config_command("caption", "caption", "CaptionConfig", ("folder",), True),
    ),
    "compare": (
        "compare methods on a classification dataset, over several seeds",
        _config_command("compare", "compare", "CompareConfig", ("data",), grouped=True),
    ),
    "search": (
        "search combinations of methods, blocks and sizes under a parameter budget",
        _config_command("search", "search", "SearchConfig", ("data",), grouped=True),
    ),
    "predict": (
        "classify images with a fine-tuned model",
        _config_command("predict", "predict", "PredictConfig", ("folder", "images"), True),
    ),
    "export": (
        "export a fine-tuned classifier to timm, open_clip, ONNX or torch.export",
        _config_command("export", "export", "ExportConfig", ("folder",), True),
    ),
    "analyze": (
        "study what the attention heads of a model do",
        _command_group(
            heads=(
                "classify the patterns of attention heads, and measure a model without each head",
                _config_command("analyze", "analyze_heads", "AnalyzeHeadsConfig", ("model", "data"), True),
            ),
        ),
    ),
    "prompts": (
        "compare trained prompts, and transfer them to other tasks and models",
        _command_group(
            similarity=(
                "rank pairs of trained prompts by similarity, to choose the initial prompt of another task",
                _config_command("prompts", "prompt_similarity", "PromptSimilarityConfig", ("files",), True),
            ),
            spot=(
                "initialize the prompt of a task from the most similar ones of other tasks",
                _config_command("prompts", "spot", "SpotConfig", ("files",), True),
            ),
            transfer=(
                "transfer a trained prompt to another task or another model, by a projector between the models",
                _config_command("prompts", "transfer_prompt", "PromptTransferConfig", ("file",), True),
            ),
        ),
    ),
    "control": (
        "train control adapters (ControlNet and others), and generate with them",
        _command_group(
            train=(
                "train a control adapter: ControlNet, T2I-Adapter, ControlNeXt or IP-Adapter",
                _training_command("control", "ControlConfig", "data"),
            ),
            generate=(
                "generate images with control adapters",
                _config_command("control", "generate_controlled", "ControlGenerateConfig", ("prompt",), True, grouped=True),
            ),
        ),
    ),
    "generate": (
        "generate images with trained adapters",
        _config_command("generate", "generate", "GenerateConfig", ("prompt",), True, grouped=True),
    ),
    "inspect": (
        "show the contents of an adapter file",
        _config_command("inspect_file", "inspect_file", "InspectConfig", ("file",), True),
    ),
    "convert": (
        "convert an adapter file to another format",
        _config_command("convert", "convert", "ConvertConfig", ("file",), True),
    ),
    "convert-config": (
        "convert a config of kohya's sd-scripts or ai-toolkit to one of personalize",
        _config_command("convert_config", "convert_config", "ConvertConfigConfig", ("file",), True),
    ),
    "merge": ("merge several adapter files into one", _config_command("merge", "merge", "MergeConfig", ("files",), True)),
    "extract": (
        "extract a LoRA from a fine-tuned model",
        _config_command("extract", "extract", "ExtractConfig", ("tuned",), True),
    ),
    "resize": ("change the rank of an adapter file", _config_command("resize", "resize", "ResizeConfig", ("file",), True)),
    "push": (
        "upload a finished run to the model hub with a model card",
        _config_command("push", "push", "PushConfig", ("folder", "repo"), True),
    ),
    "sites": ("list the sites of a model, which are the layers that methods can adapt", _sites),
    "methods": ("list the methods, and the hosts (model families) that they support", registry_command("methods")),
    "hosts": ("list the hosts, which are the supported model families", registry_command("hosts")),
    "examples": (
        "write the example photos to a folder",
        _config_command("examples", "examples", "ExamplesConfig", ("folder",), True),
    ),
    "app": ("open the app in the browser", _config_command("apps.server", "app", "AppConfig")),
    "bench": ("measure speed and memory against the base model and peft", _config_command("bench", "bench", "BenchConfig")),
    "pretrain-base": (
        "train the bundled base models from scratch",
        _config_command("pretrain_base", "pretrain_base", "PretrainConfig"),
    ),
}
