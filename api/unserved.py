"""The routes of the supported APIs that are not served yet.

Without them these requests would get a 404, which clients take for an unknown model.
"""

from __future__ import annotations

from typing import Never

from starlette.requests import Request
from starlette.routing import Route

from shared.errors import NotImplementedYet

UNSERVED = (
    # ---- OpenAI
    ("POST", "/v1/responses/compact"),
    ("POST", "/v1/responses/{response_id}/cancel"),
    ("GET", "/v1/responses/{response_id}/input_items"),
)


async def unserved(request: Request) -> Never:
    raise NotImplementedYet(
        f"{request.method} {request.scope['path']} is not implemented yet: this version of Loadstone loads, unloads "
        "and lists models, and answers chat and text completions, and /docs describes everything that it serves."
    )


ROUTES = [Route(path, unserved, methods=[method], include_in_schema=False) for method, path in UNSERVED]
