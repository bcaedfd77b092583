"""Adaptive control (METHOD stage 4): reinforcement learning of when to reason, and of what to write."""
