"""An embedder as other frameworks take one, a module for each, which imports its framework when it is imported."""
