"""Strips: a benchmark on which selection and control must earn their place (`questions` says how)."""
