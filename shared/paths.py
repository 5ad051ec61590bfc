"""The paths of the API, for the server's routes, its OpenAPI document and its clients.

`{job_id}` is a placeholder in the syntax of Starlette, OpenAPI and `str.format`.
"""

MODELS = "/api/v1/models"
LOAD = f"{MODELS}/load"
UNLOAD = f"{MODELS}/unload"
ESTIMATE = f"{MODELS}/estimate"
JOBS = f"{LOAD}/status"
JOB = JOBS + "/{job_id}"
JOB_EVENTS = f"{JOB}/events"
JOB_LOGS = f"{JOB}/logs"
WORKERS = "/api/v1/workers"
MESSAGES = "/v1/messages"
ROOT = "/"
HEALTHZ = "/healthz"
READYZ = "/readyz"
METRICS = "/metrics"
OPENAPI = "/openapi.json"
DOCS = "/docs"
