"""Search over the vectors that a job wrote: exact, by signs with a second look, or by an index."""
