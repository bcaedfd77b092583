"""The KV caches of a decoder: in host memory, in place in host memory, and on a device."""
