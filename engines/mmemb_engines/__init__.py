"""Builds a bundle's graphs into engines for the machine at hand, keyed by what they depend on."""
