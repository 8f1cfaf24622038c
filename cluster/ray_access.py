"""Who may talk to a Ray cluster: a token for one that a run starts, and a cluster that cannot be reached.

Ray answers everyone who has the token of its cluster, and runs whatever code they send.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager

# Ray 2.60 reads mode and token once and has no public way to make it read them again.
from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config

from conf.schema import ConfigError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
REACH_S = 10.0  # until a cluster has to take a connection; Ray itself goes on trying for many minutes


@contextmanager
def own_token() -> Iterator[None]:
    """Give a cluster that is started inside the block a token of its own, which dies with it.

    Ray would make one for all clusters of this user, in a file of the home folder. Processes of the cluster inherit
    it by their environment, which no other user can read. What the environment says of tokens already is left alone.
    """
    if any(name in os.environ for name in (MODE, TOKEN, TOKEN_PATH)):
        yield
        return
    os.environ[MODE] = "token"
    os.environ[TOKEN] = secrets.token_hex(32)
    _read_again()
    try:
        yield
    finally:
        for name in (MODE, TOKEN):
            os.environ.pop(name, None)
        _read_again()


def check_reachable(address: str) -> None:
    """Raise ConfigError if nobody listens at the `host:port` of a cluster; another form of address is not looked at."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not host or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:  # OverflowError: no port has such a number
        remedy = "no Ray cluster answers there; see that it runs (ray start --head) and that this machine reaches it"
        raise ConfigError("cluster.address", address, f"{remedy} ({error})") from error


def refusal(address: str, error: Exception) -> ConfigError:
    """What a cluster that did not let us in is called."""
    remedy = (
        f"the Ray cluster cannot be joined ({_first_line(error)}); if it asks for a token, set {MODE}=token and "
        f"{TOKEN_PATH} to its file before the run"
    )
    return ConfigError("cluster.address", address, remedy)


def _read_again() -> None:
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
