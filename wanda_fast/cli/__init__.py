"""The program `wanda-fast`: one module per subcommand, and one place that turns errors into plain lines.

A subcommand is a module of this package with `add_arguments(parser)` and `run(args, out) -> int`; its first docstring line is
what `wanda-fast --help` shows. Add its name to `COMMANDS`. Nothing here imports torch: bad arguments are found before that.

Exit codes: 0 done; 1 the run failed (the line on stderr says why); 2 a mistake in the arguments, the model or the data;
130 interrupted. WANDA_FAST_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType

from wanda_fast.cli.parser import Parser, one_line
from wanda_fast.cli.terminal import Terminal
from wanda_fast.errors import UserError

PROGRAM = "wanda-fast"
DISTRIBUTED = ("prune", "sample")  # commands that several processes can share
COMMANDS = ("prune", "sample", "finetune", "export", "evaluate", "fid", "analyze", "compare")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # a stream of a test, or none at all
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    signals: list[int] = []
    try:
        with _terminate_cleanly(arguments, signals), _noticing_interrupts(signals):
            return _dispatch(arguments)
    except SystemExit as stop:  # of argparse, or a termination signal
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return _fail(f"interrupted; {_left(arguments)}", 130)
    except BrokenPipeError:  # nobody reads stderr any more
        return 1
    except Exception as error:
        if os.environ.get("WANDA_FAST_DEBUG", "0") not in ("", "0"):
            raise
        if signals:  # what was stopped made another error of it: imports of other packages do
            terminated = signals[-1] == signal.SIGTERM  # and the line is printed
            return 128 + signal.SIGTERM if terminated else _fail(f"interrupted; {_left(arguments)}", 130)
        if isinstance(error, UserError) and not isinstance(error, RuntimeError):
            return _fail(f"error: {one_line(error)}", 2)
        if isinstance(error, (RuntimeError, OSError, MemoryError)):
            return _fail(f"error: {one_line(error) or type(error).__name__}", 1)
        return _fail(
            f"error: unexpected {type(error).__name__}: {one_line(error)} (WANDA_FAST_DEBUG=1 shows the traceback)", 1
        )


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from wanda_fast import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        return _fail(f"error: unknown command {name!r}; known: {', '.join(COMMANDS)} (see {PROGRAM} --help)", 2)
    module = import_module(f"wanda_fast.cli.{name}")
    parser = Parser(f"{PROGRAM} {name}", module.EXAMPLES)
    module.add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return module.run(args, Terminal(quiet=args.quiet, machine=args.json))
    if name not in DISTRIBUTED:
        return _fail(f"error: {name} runs in one process; start it without torchrun or accelerate launch", 2)
    from wanda_fast.distributed import joined

    with joined() as together:
        return module.run(args, Terminal(quiet=args.quiet, machine=args.json, silent=not together.main))


def overview() -> str:
    """Text of `wanda-fast --help`."""
    lines = [
        "Smaller diffusion UNets without training. Prune the bundled model:",
        "",
        f"  {PROGRAM} prune --ratio 0.3 --pruner wanda-diff",
        "",
        "commands:",
    ]
    for name in COMMANDS:
        text = (import_module(f"wanda_fast.cli.{name}").__doc__ or "").splitlines()[0]
        lines.append(f"  {name:<10} {text}")
    lines += ["", f"{PROGRAM} COMMAND --help lists all options; {PROGRAM} --version prints the version.", ""]
    return "\n".join(lines)


def _fail(line: str, code: int) -> int:
    with suppress(BrokenPipeError, ValueError):
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)
    return code


def _left(arguments: Sequence[str]) -> str:
    """What a stopped command leaves on disk."""
    name, flags = arguments[0] if arguments else "", {word.partition("=")[0] for word in arguments}
    if name == "finetune":
        return "the checkpoints that are complete stay, and --resume goes on from the newest"
    if name == "sample" and "--grid" not in flags:
        return "the images that are complete stay, and the same command goes on from there"
    if name == "prune" and "--resume" in flags:
        return "what is complete stays beside the target, and the same command goes on from there"
    return "nothing unfinished is left behind"


@contextmanager
def _noticing_interrupts(signals: list[int]) -> Iterator[None]:
    """Python's own KeyboardInterrupt on Ctrl-C, noted as well; nothing where Ctrl-C is ignored or another's business."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _terminate_cleanly(arguments: Sequence[str], signals: list[int]) -> Iterator[None]:
    """Turn SIGTERM into an exception, so that unfinished folders are removed; as a program on its own only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        _fail(f"terminated; {_left(arguments)}", 128 + number)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
