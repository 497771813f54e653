"""What is around every program: signals, a standard output that is lost, and the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from moiie_megatron.cli.launch import leave
from moiie_megatron.cli.output import is_file_problem, report_file_problem
from moiie_megatron.mcore.process_lifetime import kill_children_on_exit
from moiie_megatron.utils.errors import UserError
from moiie_megatron.utils.signals import SignalWatch, Stopped, announce, exit_code_of


def run_program(main: Callable[[], int | None], watch: SignalWatch | None = None) -> NoReturn:
    """Call ``main`` and end the process with the exit code that it returns (None: 0).

    A signal ends it with one line and 128 + its number, and what was half written is removed.  If
    the reader of standard output goes (``| head``), the program ends without a word, as others do.
    Processes that it has forked end with it.

    Args:
        watch: For the signals; None is one for SIGINT, SIGTERM and SIGHUP.
    """
    kill_children_on_exit()
    try:
        with watch or SignalWatch():
            code = main() or 0
    except Stopped as stopped:
        announce(stopped.number)
        code = leave(exit_code_of(stopped.number))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 1
    except SystemExit as ending:  # argparse: --help, or a mistake in the arguments
        if isinstance(ending.code, str):
            raise
        code = ending.code or 0
    except OSError as error:
        if not is_file_problem(error):
            raise
        code = leave(report_file_problem(error))
    try:
        if sys.stdout is not None:
            sys.stdout.flush()  # here, because at exit an error would be a traceback
    except OSError as error:
        code = report_file_problem(error)
    sys.exit(code)
