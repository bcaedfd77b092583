"""Reads public training sets from local folders, laid out as they are published, into samples."""
