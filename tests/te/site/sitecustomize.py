"""Runs at the start of every Python process that has this directory in its ``PYTHONPATH``."""

import os

if "MOIIE_TEST_TE" in os.environ:
    from tests.te.standin.install import install

    install(os.environ["MOIIE_TEST_TE"])
