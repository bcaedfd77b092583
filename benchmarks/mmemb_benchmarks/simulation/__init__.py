"""The scheduler on a clock of its own, over an engine that takes the time that a real one was measured to take."""
