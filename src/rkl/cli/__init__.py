"""The command line: parse the words, call the verb, and print errors in one line."""
# ruff: noqa: E402

import sys

_MAIN = getattr(sys.modules["__main__"], "__spec__", None)
_AS_MODULE = sys.argv[:1] == ["-m"] or (_MAIN is not None and _MAIN.name.startswith("rkl."))
if _AS_MODULE and not sys.flags.safe_path:
    # python -m looks in the working folder first, where a triton.py of anybody's may lie.
    del sys.path[0]

import argparse
import contextlib
import importlib.metadata
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NoReturn

from rkl import runs
from rkl.cli import commands, terminal
from rkl.cli.documentation import documentation
from rkl.extras import optional_import
from rkl.importing import check_name, names_in, only
from rkl.runs import DiskFullError, full_disk, processes, signals
from rkl.text import one_line

# Flags, and the word of rkl divergences, whose text may name what is to be imported.
NAMING = ["target", "flow", "objective", "divergence", "divergences", "family", "losses", "name"]
NAMING += ["on_policy_divergence", "token_weight"]
CLOCK = 1.0  # seconds by which the times of a file system may lag
LONGEST = 800  # letters of an error; what is between its beginning and its end is left out
SHARED = "distill", "evaluate"  # commands whose work several processes share
DELAY = 10.0  # seconds in which the first process of several says what all of them would say
WAITING = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"  # what a user may have set
SPINS = 10_000  # turns of OpenMP's waiting threads before they sleep: benchmarks/waiting.py
BAD_USAGE = ValueError, TypeError, NotImplementedError, FileExistsError, FileNotFoundError


class UsageError(ValueError):
    """The words on the command line are invalid."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}. See {self.prog} --help.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parsed words; the error for unknown ones names the help of the command."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = _command(args)
            self.prog = f"{self.prog} {command}" if command in commands.COMMANDS else self.prog
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help whose examples keep their lines, and whose columns are wide enough for our names."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)
        self._action_max_length = 16  # argparse forgets that subcommands are indented

    def _format_usage(self, usage, actions, groups, prefix):
        """Words and flags that must be given; the others are listed below."""
        shown = [it for it in actions if it.required or not it.option_strings]
        line = super()._format_usage(usage, shown, [], prefix)
        return line if usage or shown == list(actions) else f"{line.rstrip()} [flags]\n\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Returns:
        0; 2 for an invalid command; 1 for a failure; 130 after
        Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _let_threads_sleep()
    terminal.prepare_streams()
    parsed, began = None, time.time()
    try:
        with (
            signals.raising(),
            terminal.one_line_warnings(),
            only(),
            terminal.first_speaks(),
            optional_import(f"rkl {_command(words) or ''}".strip()),
        ):
            parsed = _parser(words).parse_args(words)
            _check_processes(words)
            with only(_importable(parsed), folder=_working_folder()):
                _run(parsed)
            return _flush()
    except KeyboardInterrupt as stop:
        if not processes.main_process():
            return signals.exit_code(stop)
        with contextlib.suppress(OSError):  # after SIGHUP there is no terminal
            print(f"\nrkl: interrupted. {_how_to_go_on(words, parsed, began)}", file=sys.stderr)
        return signals.exit_code(stop)
    except BrokenPipeError:  # whoever read our output has read enough, as head does
        terminal.discard(sys.stdout)
        return 141
    except Exception as error:
        if "--debug" in words:
            raise
        return (isinstance(error, OSError) and _flush()) or _explain(error, words, parsed, began)


def _let_threads_sleep() -> None:
    """Shorten the time that OpenMP's threads spin between two products, unless the user chose one.

    GNU's library reads it when torch loads it. Spinning threads take the processor from whoever
    has work: beside eight busy processes 10,000 turns train small models two to three and a half
    times as fast as the default, and lose up to 15 % where nothing else runs
    (benchmarks/README.md).
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def _check_processes(words: list[str]) -> None:
    """Refuse several processes for a command that would repeat its work in each.

    Raises:
        ValueError: There are several, and this is not one of the commands that share the work.
    """
    count, command = processes.world().size, _command(words)
    if count > 1 and command not in SHARED:
        raise ValueError(
            f"rkl {command} runs in one process; {count} were started. Type it without torchrun "
            f"or accelerate launch, which are for rkl {' and rkl '.join(SHARED)}."
        )


def _run(parsed: argparse.Namespace) -> None:
    try:
        parsed.command(parsed)
    except SystemExit as error:  # of somebody's own target, say; rkl itself never does
        raise RuntimeError(f"what was run ended the program, with code {error.code!r}.") from error


def _importable(parsed: argparse.Namespace) -> list[str]:
    """Names that may be imported: those of --allow, and of flags that take one's own code."""
    given = [getattr(parsed, name, None) for name in NAMING]
    texts = [text for it in given for text in (it if isinstance(it, list | tuple) else [it])]
    return [*getattr(parsed, "allow", []), *names_in(*texts)]


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def available() -> dict[str, Callable]:
    """The commands whose wing exists, by name."""
    return {name: command for name, (command, wing) in commands.COMMANDS.items() if _exists(wing)}


def _parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser for these words: only their command declares its arguments.

    Declaring them may import the wing, which would slow down rkl --help.
    """
    parser = _Parser(
        prog="rkl",
        description="Learn one distribution from another.",
        epilog="rkl COMMAND --help shows examples.",
        formatter_class=_Help,
        allow_abbrev=False,
    )
    version = importlib.metadata.version("rkl")
    parser.add_argument("--version", action="version", version=f"rkl {version}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked_for = _command(words)
    for name, command in available().items():
        summary, _line, examples = documentation(command).partition("\n")
        subparser = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=examples,
            formatter_class=_Help,
            allow_abbrev=False,
        )
        if name == asked_for:
            subparser.set_defaults(command=command(subparser, words))
            _add_common_flags(subparser)
    return parser


def _command(words: list[str]) -> str | None:
    return next((word for word in words if not word.startswith("-")), None)


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    common = parser.add_argument_group("everywhere")
    common.add_argument("--seed", type=int, default=argparse.SUPPRESS, help="random seed")
    common.add_argument(
        "--device",
        default=argparse.SUPPRESS,
        help="device, such as cpu, cuda or cuda:1; by default the best one for the command",
    )
    common.add_argument(
        "--allow",
        type=_name,
        action="append",
        default=argparse.SUPPRESS,
        metavar="MODULE:NAME",
        help="let a run or a file of settings import this name, which runs its code",
    )
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _name(text: str) -> str:
    try:
        return check_name("it", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _exists(module: str) -> bool:
    """True if rkl has this module; unlike find_spec on its name, without importing its parents."""
    *parents, name = module.split(".")
    folder = Path(__file__).parents[1].joinpath(*parents)
    spec = PathFinder.find_spec(name, [str(folder)])
    return spec is not None and spec.origin is not None  # a folder without code has none


def _explain(
    error: Exception, words: list[str], parsed: argparse.Namespace | None, began: float
) -> int:
    message = one_line(error)
    if isinstance(error, processes.PeerError):
        if not processes.main_process():
            time.sleep(DELAY)
            return 1
        return _complain(f"{message} {_how_to_go_on(words, parsed, began)}", 1)
    if not processes.main_process() and not processes.JOINED:
        time.sleep(DELAY)  # torchrun ends this process meanwhile if the first one failed alike
    if full_disk(error):
        message = message if isinstance(error, DiskFullError) else f"the disk is full: {message}."
        return _complain(f"{message} {_how_to_go_on(words, parsed, began)}", 1)
    if terminal.out_of_memory(error):
        return _complain(f"out of memory: {message}. {_sizes(words)}", 1)
    if isinstance(error, BAD_USAGE) and message:
        return _complain(message, 2)
    if type(error).__module__.partition(".")[0] == "rkl" and message:  # which says all there is
        return _complain(message, 1)
    cause = terminal.root_cause(error)
    if isinstance(error, ImportError):
        because = f" The cause: {terminal.in_words(cause)}" * (cause is not error)
        return _complain(message + because + terminal.place_of_import(cause), 1)
    if isinstance(error, OSError) and error.filename is not None:
        return _complain(f"{error.filename}: {error.strerror}", 1)
    because = f", caused by {terminal.in_words(cause)}" * (cause is not error)
    return _complain(f"{terminal.in_words(error)}{because} (--debug shows where)", 1)


def _sizes(words: list[str]) -> str:
    """The largest numbers of a command line, which determine the memory it takes."""
    text = " ".join(words)
    numbers = re.findall(r"-{1,2}[a-z][a-z_-]*[= ]\d{4,}|\w+=\d{3,}", text)
    largest = sorted(numbers, key=lambda it: -int(re.findall(r"\d+$", it)[0]))[:3]
    if largest:
        return f"Choose smaller numbers: {', '.join(largest)}"
    return "Choose a smaller batch, fewer draws, or less data"


def _flush() -> int:
    """Write out what was printed; a full disk is reported as such."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        terminal.discard(sys.stdout)
        return _complain(f"standard output: {error.strerror}", 1)
    return 0


def _complain(message: str, code: int) -> int:
    line = one_line(message)
    if not processes.main_process():
        line = f"process {os.environ['RANK']}: {line}"
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    with contextlib.suppress(OSError, ValueError):  # a stderr that is full or closed
        print(f"rkl: error: {line}", file=sys.stderr, flush=True)
    return code


def _how_to_go_on(words: list[str], parsed: argparse.Namespace | None, began: float) -> str:
    """Command that continues what was interrupted since then, or repeats it."""
    given = vars(parsed) if parsed is not None else {}
    again = [word for word in words if word not in ("--resume", "--overwrite")]
    out = given.get("out")
    written = None if out is None else _last_written(Path(out))
    if (
        "resume" in given
        and not given.get("dry_run")
        and (written or not Path(out or "").exists())
    ):
        return f"Go on with: {_program()} {shlex.join([*again, '--resume'])}"
    # A run from before is refused, and not to be overwritten because somebody changed their mind.
    ours = written is not None and written > began - CLOCK and "resume" not in given
    if given.get("overwrite") or ours:
        again.append("--overwrite")
    return f"Begin again with: {_program()} {shlex.join(again)}"


def _program() -> str:
    """The program of a command, with torchrun for several processes."""
    with contextlib.suppress(ValueError):
        if (world := processes.world()).size > 1:
            machines = world.size // world.local_size
            several = f"--nnodes {machines} " if machines > 1 else ""
            return f"torchrun {several}--nproc_per_node {world.local_size} -m rkl"
    return "rkl"


def _last_written(folder: Path) -> float | None:
    """Time of the last change of the run, or the cache, in a folder; None without one."""
    with contextlib.suppress(OSError):
        return Path(folder, "cache.json").stat().st_mtime
    try:
        return runs.Run.open(folder).path.joinpath("run.json").stat().st_mtime
    except (OSError, ValueError):
        return None
