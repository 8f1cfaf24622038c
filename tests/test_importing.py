"""Importing without the garbage collector, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

from tests.runs import PROJECT

CODE = """
import gc
from actors.importing import uncollected

before = gc.get_freeze_count()
with uncollected():
    assert not gc.isenabled()
assert gc.isenabled()
assert gc.get_freeze_count() == before, "nothing was imported"

try:
    with uncollected():
        import wave
        raise ImportError("in the middle")
except ImportError:
    pass
assert gc.isenabled()
assert gc.get_freeze_count() > before, "what is there now is kept out of later collections"

gc.disable()
with uncollected():
    import colorsys
assert not gc.isenabled(), "as it was"
"""


def test_the_collector_is_on_again_and_leaves_alone_what_was_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
