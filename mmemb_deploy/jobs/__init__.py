"""Embedding files and folders, in chunks that survive an interruption."""
