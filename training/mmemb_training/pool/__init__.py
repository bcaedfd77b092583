"""The rationale pool (METHOD stage 1): several workers each write candidates for every question."""
