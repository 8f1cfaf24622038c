"""One run at a time on a folder: a lock that goes away with the process that holds it, whatever ends it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conf.schema import ConfigError

LOCK_FILE = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process until the block is left.

    Raises ConfigError if another process holds it, naming that process, and if nothing can be written there. The lock
    is flock(2)'s: the kernel lets go of it as the process ends, so a file that a killed run left locks nobody out.
    """
    path = folder / LOCK_FILE
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        remedy = f"nothing can be written there ({error.strerror}); name a folder that this user may write to"
        raise ConfigError("run.dir", str(folder), remedy) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            remedy = f"{holder} is at work on a run there; wait for it, end it, or name another folder"
            raise ConfigError("run.dir", str(folder), remedy) from error
        except OSError as error:
            remedy = f"its file system cannot lock {LOCK_FILE} ({error.strerror}); name a folder on another one"
            raise ConfigError("run.dir", str(folder), remedy) from error
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
