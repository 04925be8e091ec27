"""Options of a command: dataclasses made from a YAML file and flags over it.

HfArgumentParser says which flags there are and writes the help; a flag's value, like a YAML file's, is text that the
dataclass reads (`fastdpo.training.options.kinds`), as it reads Python's.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from fastdpo.commands.option_file import OptionFile, read_option_file
from fastdpo.training.options.kinds import Kind, OptionError, kinds_of, seen, suggestion
from fastdpo.training.options.unused import unused_ignored_together

__all__ = ["OptionError", "make_parser", "option_file", "parse"]

#: TrainingArguments that the short help lists; `--help_all` lists every one.
_COMMON = {
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "max_grad_norm", "activation_checkpointing", "bf16",
    "fp16", "logging_steps", "report_to", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "save_strategy",
    "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub", "seed",
}  # fmt: skip
if not hasattr(TrainingArguments, "activation_checkpointing"):  # its name from transformers 5.21 on
    _COMMON.add("gradient_checkpointing")

_IGNORE = "ignore_unused_options"
#: Names the default without printing it, so that the formatter does not add "(default: None)".
_NO_DEFAULT = "%(default).0s"


class _Parser(HfArgumentParser):
    """As transformers', but values stay text, which the dataclasses read, and an error is an OptionError."""

    def error(self, message: str) -> NoReturn:
        """Raise OptionError with argparse's message, the option in front."""
        text = message.removeprefix("argument ")
        raise OptionError(f"{text}. `{self.prog} --help` lists the options.")


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
    parser = _Parser(
        configs,
        allow_abbrev=False,
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
    kinds = {name: kind for config in configs for name, kind in kinds_of(config).items()}
    for action in parser._actions:
        if action.dest in kinds:
            _leave_as_text(action, kinds[action.dest])
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


def _leave_as_text(action: argparse.Action, kind: Kind) -> None:
    """The value of a flag stays text, which is read where a YAML file's and Python's are; so do words of a list."""
    metavars: dict[Any, str] = {int: "N", float: "X", str: "TEXT", dict: "JSON", bool: "true|false"}
    if action.nargs != 0:
        action.metavar = metavars.get(kind.base, "VALUE")
        if kind.choices:
            action.metavar = "NAME" if len(kind.choices) > 8 else "{" + ",".join(kind.choices) + "}"
        action.nargs = "+" if kind.many else action.nargs
    action.type = action.choices = None


def _tidy(action: argparse.Action) -> None:
    """Make the help of an option readable: one spelling of its name, a short value, no default that says nothing.

    The other spelling, with hyphens, is still accepted.
    """
    if not action.option_strings or action.dest in ("help", "help_all"):
        return
    action.option_strings = action.option_strings[:1]
    if action.nargs == 0 or action.dest.startswith("no_"):
        action.help = argparse.SUPPRESS  # --no_x, for flags that are on: --x false says the same
    elif action.default in (None, []) and isinstance(action.help, str):
        action.help += _NO_DEFAULT


def parse(
    parser: HfArgumentParser,
    argv: list[str],
    defaults: Mapping[str, Any] | None = None,
    check: Callable[..., None] | None = None,
) -> tuple[Any, ...]:
    """The dataclasses of `parser` from `argv`: flags before the file, before `defaults`, before the dataclasses' own.

    check: called with them all; may refuse or note options by what others say. Raises OptionError, ValueError.
    """
    kinds = {name: kind for config in parser.dataclass_types for name, kind in kinds_of(config).items()}
    path = option_file(argv)
    file = OptionFile() if path is None else read_option_file(path, kinds)
    flags = _flags(parser, argv, path, kinds)
    given = {**(defaults or {}), **file.values, **flags}
    ignore = given.get(_IGNORE, False)
    try:
        with unused_ignored_together(bool(kinds[_IGNORE].read(_IGNORE, ignore)) if _IGNORE in kinds else False):
            configs = tuple(
                config(**{name: given[name] for name in kinds_of(config) if name in given})
                for config in parser.dataclass_types
            )
            if check is not None:
                check(*configs)
    except ValueError as error:
        placed = file.placed(error, flags)
        if placed is error:
            raise
        raise placed from error
    return configs


def _flags(
    parser: argparse.ArgumentParser, argv: list[str], path: str | None, kinds: Mapping[str, Kind]
) -> dict[str, Any]:
    """Option → text, or list of texts, of the flags that are given. Of one that is given twice the last counts, as
    scripts that pass on further flags ("$@") expect."""
    absent = object()
    namespace, rest = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(kinds, absent)))
    flags = [word for word in rest if word.startswith("--")]
    if flags:
        name = flags[0].partition("=")[0]
        known = [option for action in parser._actions for option in action.option_strings]
        near = suggestion(name, known) or f" `{parser.prog} --help` lists the options."
        raise OptionError(f"{seen(name)} is no option.{near}")
    if rest or namespace.config != path:
        word = rest[0] if rest else namespace.config
        raise OptionError(
            f"option file {seen(word)} must be the first argument, before any flag; it was not read. A value stands "
            "after its flag, and several only where the option is a list."
        )
    found = {name: value for name, value in vars(namespace).items() if name in kinds and value is not absent}
    # One word is the value itself, as one of a file is
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in found.items()}


def option_file(argv: list[str]) -> str | None:
    """The YAML file of options that the arguments begin with; None where they begin with a flag."""
    return argv[0] if argv and not argv[0].startswith("-") else None
