"""The command line, `mmemb`."""
