"""Drops what a process that talks to the hub does not need: it parses what strangers wrote."""

from __future__ import annotations

import os
import ssl
import sys
from pathlib import Path

from shared import libc
from worker.sandbox import capabilities, landlock
from worker.sandbox.landlock import READ

CODE = Path(__file__).parents[1]  # the package `worker`; `shared` is beside it
LIBRARIES = ("/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix, CODE, CODE.with_name("shared"))
# How names are resolved.  resolv.conf is replaced when the network changes, so a rule for that file would not last.
NAMES = ("/etc", "/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman", "/run/nscd")


def restrict(directory: str | Path, rights: int) -> None:
    """Keep this process from files of anybody, and from other processes and programs.

    It may reach the network, and has these rights of Landlock to a directory.  Call it before it has threads.
    """
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    # Root's directory of models may belong to another user.
    capabilities.drop(keep=capabilities.READ_SEARCH | capabilities.OVERRIDE)
    if not rights & landlock.REFER or landlock.can_move():
        readable: list[str | Path] = [*LIBRARIES, *NAMES, *_certificates()]
        landlock.restrict_thread([*((path, READ) for path in readable), (directory, rights)], with_network=True)


def _certificates() -> list[str]:
    """Return the files and directories of the certificate authorities that OpenSSL trusts."""
    usual = ssl.get_default_verify_paths()
    directories = os.environ.get("SSL_CERT_DIR", usual.openssl_capath).split(os.pathsep)
    return [os.environ.get("SSL_CERT_FILE", usual.openssl_cafile), *directories]
