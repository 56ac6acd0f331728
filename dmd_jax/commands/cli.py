"""`dmd-jax COMMAND …`, also `python -m dmd_jax COMMAND …`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import shlex
import signal
import sys
from collections.abc import Sequence

from dmd_jax.errors import Stopped, UserError
from dmd_jax.parallel import processes
from dmd_jax.parallel.flags import check_flags, missing_devices
from dmd_jax.reporting.terminal import one_line, terminal

COMMANDS = {
    "quickstart": "digits from end to end: pairs, distillation, evaluation and a report",
    "convert": "read the weights of other projects: Stable Diffusion, EDM, LPIPS, Inception",
    "teacher": "train an EDM teacher on your images",
    "prompts": "write prompts of text, JSON, tables or tars as shards",
    "pairs": "write the teacher's noise-image pairs",
    "train": "distil the teacher into a one-step generator",
    "sample": "make images from weights",
    "evaluate": "measure the Fréchet distance of a model's samples to real images",
    "bench": "time a config's step or its images here, and PyTorch's beside them",
    "compile": "compile a config's step for TPUs that are not here: memory, time, traffic",
    "export": "give a generator's UNet to PyTorch diffusers",
    "ablate": "train the rows of the paper's Table 2, several seeds each, and compare them",
    "compare": "train several objectives with one budget, several seeds each, and compare them",
    "toy": "the two-mode mixture of the paper's Figure 3",
}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaints are UserErrors, so one line like all others."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 success, 2 bad input, 130 interrupted.

    Of several processes, 75 says that another one is gone, and the same command may go well.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with terminal():
            return _main(argv)
    except UserError as error:  # of the streams themselves
        with contextlib.suppress(OSError, AttributeError):
            print(f"dmd-jax: error: {one_line(str(error))}", file=sys.stderr)
        return 2


def _main(argv: list[str]) -> int:
    """`main` with the streams of `terminal`; a UserError is of these."""
    try:
        code = _outcome(argv)
    except SystemExit as ended:  # of --help
        code = ended.code
    sys.stdout.flush()
    return code


def _outcome(argv: list[str]) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    # Orbax logs the tracebacks of what it raises as well; the command reports that in one line.
    # gcsfs and google.auth likewise.
    for name in ("absl", "gcsfs", "google"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    try:
        code = _completed(argv)
        processes.leave()
    except UserError as error:
        line = one_line(str(error))
        return _fail(line, 2, f"dmd-jax: error: {line}")
    except KeyboardInterrupt:
        return _fail("interrupted", 130, "dmd-jax: interrupted")
    except Exception:
        if problem := missing_devices():
            return _fail(problem, 2, f"dmd-jax: error: {problem}")
        processes.end_by_a_bug()
        raise
    return code


def _completed(argv: list[str]) -> int:
    """Runs a command to its end, or to where a signal stopped it; returns the exit code."""
    try:
        dispatch(argv)
    except Stopped as stopped:
        print(f"dmd-jax: {stopped}", file=sys.stderr)
        return 130 if stopped.signal_number == signal.SIGINT else 0
    return 0


def _fail(line: str, code: int, said: str) -> int:
    """The exit code of a process of its own; one of several ends here, and the others with it."""
    processes.end(line, code, said)
    print(said, file=sys.stderr)
    return code


def dispatch(argv: Sequence[str]) -> None:
    """Runs a command in this process.

    Raises:
      UserError: bad input. Stopped: a signal asked a run to stop.
    """
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command {argv[0]!r}; expected one of {', '.join(COMMANDS)}")
    command = importlib.import_module(f"dmd_jax.commands.{argv[0]}")
    parser = Parser(prog=f"dmd-jax {argv[0]}", description=COMMANDS[argv[0]])
    command.add_arguments(parser)
    args, overrides = parser.parse_known_args(argv[1:])
    if overrides and not hasattr(args, "config"):
        raise UserError(f"unexpected argument {overrides[0]!r}; see {parser.prog} --help")
    args.overrides = overrides
    check_flags()
    command.run(args)


def run_step(*argv: object) -> None:
    """Runs a command as one step of another, which is shown as a user would type it.

    Raises:
      UserError, Stopped: as `dispatch`.
    """
    argv = [str(argument) for argument in argv]
    print("$ dmd-jax " + shlex.join(argv), file=sys.stderr)
    dispatch(argv)


def usage() -> str:
    """The commands, one line each."""
    lines = [f"  {name:<11} {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: dmd-jax COMMAND [--help] …", "", *lines, "", "dmd-jax COMMAND --help tells more."]
    )


if __name__ == "__main__":
    sys.exit(main())
