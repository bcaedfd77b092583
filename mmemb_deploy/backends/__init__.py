"""Ways to run a bundle's graphs; each module adapts one engine to `protocol.Backend`."""
