"""Importing large libraries without the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from what the block imports, now and later: modules, which nobody ever lets go.

    Python looks through all new objects again and again while vLLM, DeepSpeed or transformers are imported, which is a
    sixth to a quarter of the time that it takes, and through all of them at each full collection after it, of which
    starting an engine makes several. If nothing is imported that was not there, nothing changes.
    """
    was_enabled, num_modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > num_modules:
            gc.freeze()
        if was_enabled:
            gc.enable()
