"""The paths of the API: what the server routes and describes, and what its clients ask for.

`{job_id}` stands for the id of a job, as Starlette's routes and OpenAPI have it; `str.format` puts one in its place.
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
HEALTHZ = "/healthz"
READYZ = "/readyz"
METRICS = "/metrics"
OPENAPI = "/openapi.json"
DOCS = "/docs"
