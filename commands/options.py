"""Options that several commands have, groups of options as one dataclass, and the flags of the reuse policies."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import click
from click.core import ParameterSource

from ..engines.errors import InvalidRequest
from ..runtime.policies import POLICIES, policy_from_settings
from .completion import bundle_folders, names
from .console import log

Command: TypeAlias = Callable[..., Any]
Option: TypeAlias = Callable[[Command], Command]


class _Output(click.Path):
    """A file or folder to write, which `-` is none of: nothing that is made goes to stdout."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click. Raises InvalidRequest."""
        if value == "-":
            raise InvalidRequest(f"{param.name if param else 'output'}: got '-', expected a folder; give it a name")
        return super().convert(value, param, ctx)


PATH = click.Path(path_type=Path)
OUTPUT_FOLDER = _Output(path_type=Path)
SHOWN = ("gamma", "warmup", "reuse_steps", "interval", "cache")  # the order of settings in help; others follow


def common(command: Command) -> Command:
    """The options that every command has; it is given `as_json`."""

    @wraps(command)
    def logging(*arguments: Any, verbose: bool, debug: bool, **options: Any) -> Any:
        log(verbose)  # `debug` is looked for where errors are reported, as those of parsing are too
        return command(*arguments, **options)

    return _with(
        logging,
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        click.option("--verbose", is_flag=True, help="Log what is being done, on stderr."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
    )


def bundle_argument(command: Command) -> Command:
    """A bundle's folder; without one, the newest under bundles/."""
    return click.argument("bundle", required=False, type=PATH, shell_complete=bundle_folders)(command)


def group(name: str, kind: Callable[..., Any], *options: Option) -> Option:
    """Options of a command that it is given as one argument `name`: a `kind` with a field for each of them."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def grouped(*arguments: Any, **given: Any) -> Any:
            values = {option: given.pop(option) for option in own}
            return command(*arguments, **{name: kind(**values)}, **given)

        parameters: list[click.Parameter] = vars(grouped).setdefault("__click_params__", [])  # where click keeps them
        others = len(parameters)
        _with(grouped, *options)
        own = [parameter.name for parameter in parameters[others:]]
        return grouped

    return decorate


def given() -> set[str]:
    """The names of the options that were typed, whatever their values."""
    context = click.get_current_context()
    return {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}


def alternatives(words: Iterable[str]) -> str:
    """`a, b or c`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def policy_options(command: Command) -> Command:
    """The flags of all registered policies, one for each of their fields; the command is given `policy`."""
    chosen = click.option(
        "--policy",
        "policy_name",
        shell_complete=names(POLICIES),
        help=f"{alternatives(POLICIES)}.  [default: the first that has the settings given]",
    )
    settings = _policy_settings()
    shown = [name for name in SHOWN if name in settings]
    shown += [name for name in settings if name not in SHOWN]

    def policy(policy_name: str | None, **values: Any) -> Any:
        chosen = {name for name, value in values.items() if value is not None}
        having = (name for name, row in POLICIES.items() if chosen <= {setting.name for setting in fields(row)})
        if policy_name is None and not chosen:
            return None  # the pipeline's default
        return policy_from_settings(policy_name or next(having, next(iter(POLICIES))), **values)

    return group("policy", policy, chosen, *(settings[name] for name in shown))(command)


def typed_of_policy() -> list[str]:
    """Those of `policy_options` that were typed, as flags."""
    flags = {"policy_name": "--policy"} | {name: f"--{name.replace('_', '-')}" for name in _policy_settings()}
    return [flag for name, flag in flags.items() if name in given()]


def _policy_settings() -> dict[str, Option]:
    """One option for every field that any policy has, by its name."""
    having: dict[str, list[Any]] = {}
    for policy in POLICIES.values():
        for setting in fields(policy):
            having.setdefault(setting.name, []).append(policy)
    return {name: _setting_option(name, policies) for name, policies in having.items()}


def _setting_option(name: str, policies: list[Any]) -> Option:
    """The option of a field of these policies: type and default are the field's, and so is what help says."""
    settings: dict[str, Field[Any]] = {policy.name: policy.__dataclass_fields__[name] for policy in policies}
    setting, hint = next(iter(settings.values())), get_type_hints(policies[0])[name]
    (kind,) = {hint} if get_origin(hint) not in (Union, types.UnionType) else {*get_args(hint)} - {type(None)}
    told = setting.metadata["help"]
    if len(policies) == 1:
        told = f"{policies[0].name}: {told[0].lower()}{told[1:]}"
    defaults = {policy: own.metadata.get("default", own.default) for policy, own in settings.items()}
    usual = next(iter(defaults.values()))
    others = [f"{policy} {default}" for policy, default in defaults.items() if default != usual]
    return click.option(
        f"--{name.replace('_', '-')}",
        type=kind,
        shell_complete=names(setting.metadata.get("values", ())),
        help=f"{told}  [default: {'; '.join([str(usual), *others])}]",
    )


def _with(command: Command, *options: Option) -> Command:
    """Add options, the first of which help shows first."""
    for option in reversed(options):
        command = option(command)
    return command
