"""Runs at the start of every Python process that has this directory in its ``PYTHONPATH``."""

import os
import traceback

if "MOIIE_TEST_TE" in os.environ:
    try:
        from tests.te.standin.install import install

        install(os.environ["MOIIE_TEST_TE"])
    except Exception as error:  # Python would only print it and go on
        traceback.print_exc()
        raise SystemExit(1) from error
