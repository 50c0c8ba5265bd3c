"""Groups of options, and the flags of policies."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import click
import pytest
from click.testing import CliRunner

from foresight.commands.options import alternatives, given, group, policy_options
from foresight.runtime.policies import POLICIES, Forecast, Foresight, NoReuse, Static


@dataclass(frozen=True)
class Size:
    height: int
    width: int | None


@dataclass(frozen=True)
class Guess(NoReuse):
    """A policy of somebody else."""

    name: ClassVar[str] = "guess"
    order: int = field(default=2, metadata={"help": "Of the polynomial."})
    base: str = field(default="power", metadata={"help": "Its kind.", "values": ("power", "hermite")})
    horizon: float | None = field(default=None, metadata={"help": "In steps.", "default": "all"})


@click.command()
@policy_options
def show(policy: Any) -> None:
    click.echo(repr(policy))


def test_a_group_of_options_is_one_argument() -> None:
    @click.command()
    @click.option("--before")
    @group("size", Size, click.option("--height", type=int, default=8), click.option("--width", type=int))
    @click.option("--after")
    def command(before: str, size: Size, after: str) -> None:
        click.echo(f"{before} {size} {after}")

    result = CliRunner().invoke(command, ["--before", "b", "--after", "a", "--width", "2"])
    assert result.output == f"b {Size(8, 2)} a\n"
    options = [option.name for option in command.params]
    assert options == ["before", "height", "width", "after"]


def test_given_are_the_options_that_were_typed() -> None:
    @click.command()
    @click.option("--steps", default=3)
    @click.option("--seed", default=0)
    def command(steps: int, seed: int) -> None:
        click.echo(given())

    assert CliRunner().invoke(command, ["--seed", "0"]).output == "{'seed'}\n"


def test_every_setting_of_every_policy_is_a_flag_of_its_type() -> None:
    types = {option.name: option.type.name for option in show.params}
    assert {setting.name for policy in POLICIES.values() for setting in fields(policy)} == types.keys() - {
        "policy_name"
    }
    assert (types["gamma"], types["warmup"], types["cache"]) == ("float", "integer", "text")


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        ([], None),
        (["--tolerance", "0.01"], Forecast(tolerance=0.01)),
        (["--warmup", "9"], Foresight(warmup=9)),
        (["--warmup", "9", "--interval", "4"], Foresight(warmup=9, interval=4)),
        (["--gamma", "1", "--warmup", "4"], Foresight(gamma=1.0, warmup=4)),
        (["--policy", "static", "--reuse-steps", "2", "--interval", "3"], Static(reuse_steps=2, interval=3)),
        (["--policy", "none", "--cache", "residual"], NoReuse(cache="residual")),
    ],
    ids=str,
)
def test_flags_make_the_policy(flags: list[str], policy: Any) -> None:
    assert CliRunner().invoke(show, flags).output == f"{policy!r}\n"


def test_a_new_policy_brings_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "guess", Guess)

    @click.command()
    @policy_options
    def command(policy: Any) -> None:
        click.echo(repr(policy))

    flags = ["--policy", "guess", "--order", "3", "--base", "hermite"]
    assert CliRunner().invoke(command, flags).output == f"{Guess(order=3, base='hermite')!r}\n"
    told = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=110).output.split())
    assert f"--policy TEXT {', '.join(list(POLICIES)[:-1])} or guess." in told
    assert "--order INTEGER guess: of the polynomial. [default: 2]" in told
    assert "--horizon FLOAT guess: in steps. [default: all]" in told
    assert "--cache TEXT What is cached: output or residual. [default: output]" in told


@pytest.mark.parametrize(("words", "told"), [(["a"], "a"), (["a", "b"], "a or b"), (["a", "b", "c"], "a, b or c")])
def test_alternatives(words: list[str], told: str) -> None:
    assert alternatives(words) == told
