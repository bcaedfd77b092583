"""Trains MMEmb-R1 checkpoints: a Qwen3-VL that decides per input whether to reason before it embeds."""
