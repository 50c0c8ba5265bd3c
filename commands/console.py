"""What the commands share: lines or one JSON document on stdout, progress and errors on stderr, exit codes, signals."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from importlib import import_module
from typing import Any, NoReturn

import click

from .. import __version__
from ..engines import wording
from ..engines.errors import ForesightError, IntegrityError, OutputError
from ..engines.progress import OnProgress, Progress
from .interrupt import Interrupted, Interrupts
from .progress import displayed

Row = dict[str, Any]  # of one video, as --json shows it
COMMANDS = (
    "batch",
    "bench",
    "build",
    "env",
    "evaluate",
    "export",
    "inspect",
    "package",
    "parity",
    "run",
    "serve",
    "sign",
    "tune",
    "verify",
)  # each a module here, and its function
RENAMED = {"compare": "parity"}
HELP = {"-h", "--help", "--version"}
ARGUMENT = re.compile(r"(?<![\w'\"/.-])[a-z]+(?:_(?:[a-z]+|\d))+(?![\w'\"/-]|\.\w)")  # not of a path or what was quoted


@dataclass(frozen=True)
class Session:
    """What the commands share: the rows of finished videos, which an error reports too, and the signals that came."""

    finished: list[Row] = field(default_factory=list)
    interrupts: Interrupts = field(default_factory=Interrupts)


class Group(click.Group):
    """The commands, each imported when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names that help shows."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """The command of that name, if there is one."""
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f".{name}", __package__), name)
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that was typed. Raises UsageError, also for a name of old."""
        name, *others = arguments
        if name in RENAMED and not context.resilient_parsing:  # as completion parses
            typed = shlex.join([RENAMED[name], *others])
            raise click.UsageError(f"{name}: this command is called {RENAMED[name]}; run: {wording.command(typed)}")
        return super().resolve_command(context, arguments)

    def invoke(self, context: click.Context) -> Any:
        """Raises Interrupted instead of KeyboardInterrupt, which click would answer with a line of its own."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            raise Interrupted from error


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    session, is_process = Session(), sys._getframe(1).f_globals.get("__name__") == "__main__"
    try:
        session.interrupts.install()
        code = _run(list(sys.argv[1:] if arguments is None else arguments) or ["--help"], session)
    except KeyboardInterrupt:  # just before its work began, or just after it was done
        session.interrupts.ending()
        code, message = session.interrupts.end
        click.echo(f"error: {message}", err=True)
    finally:
        if not is_process:  # else what comes while the interpreter ends is answered too
            session.interrupts.restore()
    sys.exit(code)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="foresight")
def cli() -> None:
    """Text-to-video diffusion transformers, compiled block by block; blocks that would not change are not run."""


def print_result(document: Any, as_json: bool, lines: Sequence[str]) -> None:
    """Print a result, a plain document or a dataclass, or the lines that tell it to people.

    Raises OutputError, or Exit where nobody reads it any more.
    """
    if as_json:
        plain = asdict(document) if is_dataclass(document) and not isinstance(document, type) else document
        lines = [json.dumps(plain, indent=1, allow_nan=False)]
    print_lines(lines)


def print_lines(lines: Sequence[str]) -> None:
    """Print a part of a result. Raises OutputError, or Exit where nobody reads it any more."""
    try:
        click.echo("\n".join(lines))
    except OSError as error:
        failure = _stdout_error(error)
        raise click.exceptions.Exit(1) if isinstance(error, BrokenPipeError) else failure from error


@contextmanager
def progress(label: str = "") -> Iterator[OnProgress]:
    """What shows progress on stderr, with `label` before each phase, while the block runs."""
    interrupts = current_session().interrupts
    with displayed() as display:

        def show(progress: Progress) -> None:
            interrupts.check()
            display(replace(progress, phase=label + progress.phase) if label else progress)

        yield show


def parts(show: OnProgress, phase: str) -> Callable[[int, int, str], None]:
    """Shows the parts that are done, and the one that comes next."""

    def tell(done: int, total: int, name: str) -> None:
        show(Progress(phase, done, total, "parts", name))

    return tell


def current_session() -> Session:
    """The session of the command that runs."""
    found: Session = click.get_current_context().obj
    return found


def log(verbose: bool) -> None:
    """Let the library log on stderr: its warnings, or all that it says."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    logging.getLogger("foresight").setLevel(logging.INFO if verbose else logging.WARNING)


def _run(arguments: list[str], session: Session) -> int:
    """Run a command and report its error, if it ends with one; returns the exit code."""
    try:
        code: int | None = cli.main(args=arguments, prog_name="foresight", standalone_mode=False, obj=session)
        session.interrupts.check()  # something may have swallowed it
        session.interrupts.ending()
        return code or 0  # None, or an Exit's code
    except BaseException as error:  # noqa: BLE001 - raised again where it is a mistake of ours
        session.interrupts.ending()
        code, message, failure = _explain(error, arguments, session.interrupts)
    if "--debug" in arguments:
        traceback.print_exception(failure)
    if "--json" in arguments:
        told = {"type": type(failure).__name__, "message": message, "exit_code": code}
        with suppress(OutputError, click.exceptions.Exit):  # the line on stderr and the exit code say more
            finished = {"finished": session.finished} if session.finished else {}
            print_lines([json.dumps({"error": told, **finished})])
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _explain(error: BaseException, arguments: list[str], interrupts: Interrupts) -> tuple[int, str, BaseException]:
    """Exit code, message, and the error that they are of. Raises what is nobody's mistake but ours."""
    if interrupts.came is not None or isinstance(error, (KeyboardInterrupt, Interrupted, click.Abort)):
        return *interrupts.end, KeyboardInterrupt() if isinstance(error, Interrupted) else error
    if isinstance(error, ForesightError):
        of_files = isinstance(error, IntegrityError)  # whose fields may be called as arguments are
        return error.exit_code, str(error) if of_files else _with_flags(str(error), arguments), error
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message(), error
    if isinstance(error, OSError) and not HELP.isdisjoint(
        arguments
    ):  # help is printed by click, all else by print_lines
        failure = _stdout_error(error)
        return failure.exit_code, str(failure), failure
    raise error


def _with_flags(message: str, typed: Collection[str]) -> str:
    """The library speaks of arguments, `cache_memory`; whoever types commands knows them as flags, `--cache-memory`."""
    if ARGUMENT.search(message) is None:
        return message
    context = click.Context(cli)
    commands = [cli.get_command(context, name) for name in COMMANDS]
    flags = {flag for command in commands if command for option in command.params for flag in option.opts}

    def flag_of(match: re.Match[str]) -> str:
        word, flag = match.group(), f"--{match.group().replace('_', '-')}"
        is_typed = any(word in argument for argument in typed)  # a file, say, or a prompt
        return flag if flag in flags and not is_typed else word

    return ARGUMENT.sub(flag_of, message)


def _stdout_error(error: OSError) -> OutputError:
    """What to raise after stdout has failed; nothing is written to it any more."""
    with suppress(OSError):  # Python would try once more at its end, and complain, as what was not written is kept
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputError(
        f"stdout: {error.strerror or error}; send it to where it can be written; files that were written are kept"
    )
