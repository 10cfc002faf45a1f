"""Post-training quantization: an ONNX model in floats becomes a standard ONNX model with integers in it."""
