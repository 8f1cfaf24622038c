"""Importing large libraries without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from what the block makes, now and later: modules, which nobody ever lets go.

    Python looks through all new objects again and again while vLLM, DeepSpeed or transformers are imported, which is a
    sixth to a quarter of the time that it takes, and through all of them at each full collection after it, of which
    starting an engine makes several.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
