"""Measures a bundle: quality and latency with and without reasoning, and the controls that keep the figures honest."""
