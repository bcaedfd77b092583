"""A bundle on disk: what its manifest says, what its tensors are called, and what is checked before it is trusted."""
