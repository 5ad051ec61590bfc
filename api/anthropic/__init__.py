"""The forms of Anthropic's API."""
