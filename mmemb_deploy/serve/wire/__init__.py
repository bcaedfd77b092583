"""The contracts: for each, its requests and replies as models, and pure functions from one to the other."""
