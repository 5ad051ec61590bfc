"""The program `loadstone`: supervises the servers, and is a client of the API."""
