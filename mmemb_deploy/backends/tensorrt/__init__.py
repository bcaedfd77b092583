"""TensorRT and TensorRT for RTX: the libraries (api), engines on disk (files) and running (engine), and the backend."""
