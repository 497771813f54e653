"""What stands where the Python interpreter would: asks the fork server to run a script.

``fork_server.py`` writes it, with its two constants filled in, into an executable file.  It is
the process that a test knows: signals go through it to the fork, the fork's exit code or deadly
signal becomes its own, and the fork is killed when this process is.  Whatever the server does not
run (options, an environment that the imports may depend on) is run by Python itself.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys

PYTHON = "@PYTHON@"
SOCKET = "@SOCKET@"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def exactly(connection, size):
    """So many bytes; less when the server is gone."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            break
        data += part
    return data


def run_by_python():
    """Never returns."""
    os.execv(PYTHON, [PYTHON, *sys.argv[1:]])


def main():
    words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]
    if not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
        run_by_python()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(SOCKET)
        question = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
        message = json.dumps(question).encode()
        socket.send_fds(connection, [struct.pack("!q", len(message))], [0, 1, 2])
        connection.sendall(message)
        answer = exactly(connection, 8)
        pid = struct.unpack("!q", answer)[0] if len(answer) == 8 else sys.exit("no fork server")
        if not pid:
            run_by_python()

        def forward(number, frame):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in FORWARDED:
            signal.signal(number, forward)
        answer = exactly(connection, 8)
    code = struct.unpack("!q", answer)[0] if len(answer) == 8 else sys.exit("no fork server")
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    # Nothing here is worth the time of a tidy end.
    os._exit(code)


main()
