"""The routes and the forms of OpenAI's API."""
