"""Which token a request needs, by route."""

from __future__ import annotations

from typing import Literal, assert_never

from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from shared import paths
from shared.errors import InsufficientScope
from shared.tokens import Scope as TokenScope

Access = Literal[
    "open",  # no token
    "infer",  # a token with either scope
    "manage",  # a token with the scope `manage`
]

# A route that is missing here stops the process at its start.  HEAD needs what GET does.
ACCESS: dict[tuple[str, str], Access] = {
    # The page and the document say nothing of the pool; anybody can read them in the source.
    ("GET", paths.ROOT): "open",
    ("GET", paths.HEALTHZ): "open",
    ("GET", paths.READYZ): "open",
    ("GET", paths.DOCS): "open",
    ("GET", paths.OPENAPI): "open",
    # ---- lists of models
    ("GET", paths.MODELS): "infer",
    ("GET", paths.V1_MODELS): "infer",
    ("GET", paths.V1_MODEL): "infer",
    ("GET", paths.V0_MODELS): "infer",
    ("GET", paths.V0_MODEL): "infer",
    # ---- requests to models
    ("POST", paths.CHAT_COMPLETIONS): "infer",
    ("POST", paths.COMPLETIONS): "infer",
    ("POST", paths.CHAT_INPUT_TOKENS): "infer",
    ("POST", paths.EMBEDDINGS): "infer",
    **{("POST", path): "infer" for path in paths.RERANKS},
    ("POST", paths.RESPONSES): "infer",
    ("POST", paths.RESPONSES_INPUT_TOKENS): "infer",
    ("DELETE", paths.RESPONSES): "infer",
    ("GET", paths.RESPONSE): "infer",
    ("DELETE", paths.RESPONSE): "infer",
    ("POST", "/v1/responses/compact"): "infer",
    ("POST", "/v1/responses/{response_id}/cancel"): "infer",
    ("GET", "/v1/responses/{response_id}/input_items"): "infer",
    ("POST", paths.MESSAGES): "infer",
    ("POST", paths.COUNT_TOKENS): "infer",
    ("POST", paths.NATIVE_CHAT): "infer",
    ("POST", paths.V0_CHAT_COMPLETIONS): "infer",
    ("POST", paths.V0_COMPLETIONS): "infer",
    ("POST", paths.V0_EMBEDDINGS): "infer",
    ("POST", paths.TOKENIZE): "infer",
    ("GET", paths.TOKENIZER_INFO): "infer",
    ("POST", paths.DETOKENIZE): "infer",
    ("POST", paths.APPLY_TEMPLATE): "infer",
    # ---- loads, and what they show of other clients
    ("POST", paths.LOAD): "manage",
    ("POST", paths.ESTIMATE): "manage",
    ("GET", paths.JOBS): "manage",
    ("GET", paths.JOB): "manage",
    ("DELETE", paths.JOB): "manage",
    ("GET", paths.JOB_EVENTS): "manage",
    ("GET", paths.JOB_LOGS): "manage",
    ("POST", paths.UNLOAD): "manage",
    # ---- downloads
    ("POST", paths.DOWNLOAD): "manage",
    ("GET", paths.DOWNLOADS): "manage",
    ("GET", paths.ONE_DOWNLOAD): "manage",
    ("DELETE", paths.ONE_DOWNLOAD): "manage",
    ("GET", paths.DOWNLOAD_EVENTS): "manage",
    ("POST", paths.PAUSE_DOWNLOAD): "manage",
    ("POST", paths.RESUME_DOWNLOAD): "manage",
    ("DELETE", paths.MODEL): "manage",
    # ---- the pool
    ("GET", paths.WORKERS): "manage",
    ("GET", paths.METRICS): "manage",
}
OPEN_PATHS = frozenset(path for (_, path), access in ACCESS.items() if access == "open")


def guarded(route: Route) -> Route:
    """Let a route refuse tokens without the scope that it needs."""
    (method,) = (route.methods or set()) - {"HEAD"}
    access, inner = ACCESS[method, route.path], route.app

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not is_allowed(access, scope["state"]["scope"]):
            raise InsufficientScope("The request needs a token with the scope 'manage'; this one has 'infer'.")
        await inner(scope, receive, send)

    guard: ASGIApp = app
    route.app = guard
    return route


def is_allowed(access: Access, scope: TokenScope) -> bool:
    """Return whether a token with a scope gives access."""
    match access:
        case "open" | "infer":
            return True
        case "manage":
            return scope == "manage"
        case _:
            assert_never(access)
