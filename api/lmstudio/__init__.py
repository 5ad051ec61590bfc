"""The forms of LM Studio's API before its version 1."""
