"""In place of programs that only a cluster has: notes the call.  ``nvidia-smi -L`` finds no GPU."""

from __future__ import annotations

import os
import sys

from common import note

if __name__ == "__main__":
    note(os.environ["STANDIN_NAME"], words=sys.argv[1:])
    sys.exit(9 if sys.argv[1:] == ["-L"] else 0)
