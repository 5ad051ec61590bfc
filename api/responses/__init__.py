"""Responses: conversations in the newer form of OpenAI's API."""
