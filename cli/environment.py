"""What the environment says of connections: proxies, and certificates for TLS.

Sentences name variables, never their values, which may be secret.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Collection
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore

from cli.failure import Failure, error

PROXY_VARIABLES = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"})  # in any case of letters
TLS_VARIABLES = frozenset({"SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"})


def proxy_for(scheme: str, netloc: str) -> httpcore.Proxy | None:
    """Return the proxy for a server; None: connect to it directly.  Raises Failure."""
    proxies = getproxies()
    text = proxies.get(scheme) or proxies.get("all")
    if not text or proxy_bypass(netloc):
        return None
    try:
        url = urlsplit(text if "://" in text else f"http://{text}")
        port = url.port
    except ValueError:
        raise _unusable("proxies", PROXY_VARIABLES, "invalid port") from None
    if url.scheme.startswith("socks"):
        raise _unusable("proxies", PROXY_VARIABLES, "SOCKS is not supported")
    if url.scheme not in ("http", "https"):
        raise _unusable("proxies", PROXY_VARIABLES, "unknown scheme")
    try:
        host = (url.hostname or "").encode("idna")
    except UnicodeError:
        host = b""
    if not host:
        raise _unusable("proxies", PROXY_VARIABLES, "invalid host name")
    user, password = (unquote(text or "").encode() for text in (url.username, url.password))
    return httpcore.Proxy(
        httpcore.URL(scheme=url.scheme, host=host, port=port, target=b"/"),
        auth=(user, password) if user or password else None,
        ssl_context=tls_context() if url.scheme == "https" else None,
    )


def proxies_named() -> str:
    """Return the names of the variables that set proxies."""
    return _names(PROXY_VARIABLES - {"NO_PROXY"})


def tls_context() -> ssl.SSLContext:
    """Return the context for TLS, with the certificates that the environment names.  Raises Failure."""
    file, directory = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    try:
        if file or directory:
            return ssl.create_default_context(cafile=file or None, capath=None if file else directory)
        return httpcore.default_ssl_context()
    except ssl.SSLError as e:
        raise _unusable("TLS", TLS_VARIABLES, e.reason.replace("_", " ").lower()) from None
    except OSError as e:
        raise _unusable("TLS", TLS_VARIABLES, str(e.strerror)) from None


def _unusable(what: str, variables: Collection[str], why: str) -> Failure:
    sentence = f"The environment's settings for {what} ({_names(variables)}) are unusable: {why}."
    return Failure(error("invalid_environment", sentence))


def _names(variables: Collection[str]) -> str:
    """Return the names of the variables that are set, as they are written."""
    return ", ".join(sorted(name for name, value in os.environ.items() if value and name.upper() in variables))
