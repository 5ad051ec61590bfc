"""The paths of the API, for the server's routes, its OpenAPI document and its clients.

`{job_id}` is a placeholder in the syntax of Starlette, OpenAPI and `str.format`.  `{model_id}` stands for the rest of
the path, since the key of a model has a slash.
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
V0_MODELS = "/api/v0/models"
V0_MODEL = V0_MODELS + "/{model_id}"
V1_MODELS = "/v1/models"
V1_MODEL = V1_MODELS + "/{model_id}"
CHAT_COMPLETIONS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = "/v1/messages"
ROOT = "/"
HEALTHZ = "/healthz"
READYZ = "/readyz"
METRICS = "/metrics"
OPENAPI = "/openapi.json"
DOCS = "/docs"
