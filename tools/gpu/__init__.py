"""The parts of `python -m onnxc.tools.gpu_check`."""
