"""What a load takes, and where it goes: pure functions for both sides."""
