"""`onnxc check`: a compiled model against what ONNX says it computes; what differs is traced to its cause."""
