"""Pair-aware selection (METHOD stage 2): which rationales help their pair, by counterfactual intervention."""
