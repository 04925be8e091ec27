"""Options of a command: dataclasses read by HfArgumentParser from a YAML file and flags over it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

#: TrainingArguments that the short help lists; `--help_all` lists every one.
_COMMON = {
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "max_grad_norm", "activation_checkpointing", "bf16",
    "fp16", "logging_steps", "report_to", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "save_strategy",
    "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub", "seed",
}  # fmt: skip
if not hasattr(TrainingArguments, "activation_checkpointing"):  # its name from transformers 5.21 on
    _COMMON.add("gradient_checkpointing")

#: Names the default without printing it, so that the formatter does not add "(default: None)".
_NO_DEFAULT = "%(default).0s"


class OptionError(ValueError):
    """An option file that cannot be read, or that names an unknown option."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and leaves the description's lines as they are."""


class _HelpAll(argparse.Action):
    """Prints the help with the options that the short help leaves out."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for action in parser._actions:
            if hasattr(action, "full_help"):
                action.help = action.full_help
        parser.print_help()
        parser.exit()


def make_parser(prog: str, description: str, *configs: type) -> HfArgumentParser:
    """A parser of `configs`, each a group of the help, with an option file as first argument.

    The help of a config that derives from TrainingArguments lists its own options and the common inherited ones;
    `--help_all` lists every one.
    """
    parser = HfArgumentParser(
        configs,
        prog=prog,
        usage=f"{prog} [FILE.yaml] [--option VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
        add_help=True,
    )
    parser.add_argument(
        "config", nargs="?", metavar="FILE.yaml", help="options in YAML; flags override them%(default).0s"
    )
    inherited: set[str] = set()
    for config in configs:
        if issubclass(config, TrainingArguments):
            inherited |= {field.name for field in dataclasses.fields(TrainingArguments)}
            own = {field.name for field in dataclasses.fields(config)} - inherited
            _regroup(parser, f"training (transformers.{TrainingArguments.__name__})", inherited)
            _regroup(parser, "preference optimisation", own)
            parser.add_argument(
                "--help_all", action=_HelpAll, nargs=0, help="list every option of transformers too%(default).0s"
            )
    for action in parser._actions:
        _tidy(action)
        if action.dest in inherited and action.dest not in _COMMON:
            action.full_help = action.help
            action.help = argparse.SUPPRESS
    return parser


def _regroup(parser: argparse.ArgumentParser, title: str, names: set[str]) -> None:
    """Move the options in `names` to a help group of their own."""
    group = parser.add_argument_group(title)
    for each in parser._action_groups:
        moved = [action for action in each._group_actions if action.dest in names]
        if each is not group and moved:
            each._group_actions = [action for action in each._group_actions if action not in moved]
            group._group_actions += moved


def _tidy(action: argparse.Action) -> None:
    """Make the help of an option readable: one spelling of its name, a short value, no default that says nothing.

    The other spelling, with hyphens, is still accepted.
    """
    if not action.option_strings or action.dest in ("help", "help_all"):
        return
    action.option_strings = action.option_strings[:1]
    if action.choices is None:
        metavars: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
        action.metavar = metavars.get(action.type, "true|false")
    elif len(list(action.choices)) > 8:
        action.metavar = "NAME"
    if action.nargs == 0 or action.dest.startswith("no_"):
        action.help = argparse.SUPPRESS  # --no_x, for flags that are on: --x false says the same
    elif action.default in (None, []) and isinstance(action.help, str):
        action.help += _NO_DEFAULT


def parse(parser: HfArgumentParser, argv: list[str]) -> tuple[Any, ...]:
    """The dataclasses of `parser` from `argv`. Raises OptionError, ValueError; exits on unknown flags."""
    path = option_file(argv)
    if path is not None:
        parser.set_defaults(**read_option_file(path, parser))
    *configs, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if rest.config != path:
        raise OptionError(f"option file {rest.config!r} must be the first argument, before any flag; it was not read.")
    return tuple(configs)


def option_file(argv: list[str]) -> str | None:
    """The YAML file of options that the arguments begin with; None where they begin with a flag."""
    return argv[0] if argv and not argv[0].startswith("-") else None


def read_option_file(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options in the YAML file at `path`. Raises OptionError for what is no option of `parser`."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise OptionError(
            f"option file {path!r}: no such file. The first argument is a YAML file of options, or a flag."
        )
    try:
        options = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise OptionError(f"option file {path!r} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise OptionError(
            f"option file {path!r} holds a {type(options).__name__}; lines of the form 'name: value' are needed."
        )
    known = {action.dest for action in parser._actions} - {"help", "help_all", "config"}
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " `fastdpo train --help` lists the options."
            raise OptionError(f"option file {path!r}: {name!r} is no option.{hint}")
    return options
