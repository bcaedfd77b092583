"""The embedded default model: a Qwen3-VL of 1.5M parameters that learns DigitChain by the full method on 2 cores."""
