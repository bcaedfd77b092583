"""TensorRT and TensorRT for RTX: their names, the engines that were built, and how they run."""
