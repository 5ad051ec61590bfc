"""The OpenAPI document and the documentation page of the API."""
