"""Retrieval quality with and without reasoning, and the gate's calibration on it."""
