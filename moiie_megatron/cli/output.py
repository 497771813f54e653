"""Files that cannot be written or read, and a standard output that nobody reads any more."""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from typing import Final, TypeGuard

from moiie_megatron.utils.files import WRITING

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Told with the name of the file.
_OF_A_FILE: Final = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
)


def is_file_problem(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error is a full disk, a file of no use, or an output that nobody reads."""
    if not isinstance(error, OSError):
        return False
    if error.errno == errno.EPIPE:
        return not _has_reader()
    return error.errno in _NO_ROOM or (error.errno in _OF_A_FILE and error.filename is not None)


def report_file_problem(error: OSError) -> int:
    """Say what cannot be used, unless a reader had enough; return the exit code.

    The code is the one of programs that SIGPIPE ends, or 1.
    """
    code = 128 + signal.SIGPIPE
    if error.errno != errno.EPIPE:
        file = str(error.filename2 or error.filename or "Standard output or a file")
        where = file.removesuffix(WRITING)
        is_full = error.errno in _NO_ROOM
        remedy = "make room there" if is_full else "name another one, or correct its path"
        reason = f"error: {where} cannot be used ({error.strerror}): {remedy}."
        print(reason, file=sys.stderr, flush=True)
        code = 1
    if error.errno in (errno.EPIPE, *_NO_ROOM):  # standard output may be what is lost
        silence_output()
    return code


def silence_output() -> None:
    """What is printed goes nowhere from now on; what has not been written yet does, too."""
    try:
        output = sys.stdout.fileno()
    except (io.UnsupportedOperation, AttributeError):  # kept in memory, or none
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    sys.stdout.flush()


def _has_reader() -> bool:
    """Whether standard output is not a pipe whose other end is closed."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLERR)
    except (io.UnsupportedOperation, AttributeError):
        return True
    return not any(event & select.POLLERR for _, event in poll.poll(0))
