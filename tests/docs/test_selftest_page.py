"""The page about the self-test lists its checks, in order."""

from __future__ import annotations

import re

from moiie_megatron.selftest.catalogue import CHECKS
from tests.docs.doc_pages import ROOT


def test_the_table_of_checks() -> None:
    page = (ROOT / "docs/selftest.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == [check.name for check in CHECKS]
