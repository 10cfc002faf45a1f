"""Engines side by side on the same models: `onnxc bench`."""
