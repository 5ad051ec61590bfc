"""The program `loadstone`: a supervisor of the servers, and a client of the API."""
