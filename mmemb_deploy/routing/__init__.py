"""From rows to embeddings: the fast path, the gate, who reasons, and decoding from the KV cache."""
