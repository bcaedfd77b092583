"""Ways to run a graph; each module adapts one engine to `session.Session`."""
