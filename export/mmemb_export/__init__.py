"""Turns an MMEmb-R1 checkpoint into a bundle: four ONNX graphs, a calibrated gate, and a parity certificate."""
