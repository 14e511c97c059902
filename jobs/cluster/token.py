"""Whether Ray shows its token to the cluster that a run joins; decided before Ray is imported.

`ray start` asks for a token since Ray 2.60, but ray.init shows it to the address `auto` alone. To a
cluster without tokens it must not be shown: a driver that has one wants the cluster to have it,
too, does not listen to it, and is taken for dead.
"""

import os
import subprocess
import sys
from pathlib import Path

RAY_TOKEN = Path("~/.ray/auth_token")
"""Where Ray keeps its token unless RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH says otherwise."""

ANSWER_SECONDS = 30.0

ASK_WITHOUT_TOKEN = """
import socket, sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
address = canonicalize_bootstrap_address(sys.argv[1])
host, _, port = address.rpartition(":")
# Ray itself would try for a minute.
socket.create_connection((host.strip("[]"), int(port)), 5).close()
GcsClient(address=address).internal_kv_exists(b"rsr", None, timeout=5)
"""


def show_token_where_wanted(address: str) -> None:
    """Set RAY_AUTH_MODE, unless the user has, to what the cluster at `address` goes by.

    Nothing is done where there is no token. A cluster that does not answer counts as one that
    wants it: whoever joins it says what is wrong.
    """
    named = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if "RAY_AUTH_MODE" in os.environ or not (named or RAY_TOKEN.expanduser().exists()):
        return
    os.environ["RAY_AUTH_MODE"] = "disabled" if _answers_without_token(address) else "token"


def _answers_without_token(address: str) -> bool:
    """Ask in a process of its own, since Ray reads its mode when it is imported."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", ASK_WITHOUT_TOKEN, address],
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0
