"""Forget sets: from files and hub datasets to a table of tokens."""
