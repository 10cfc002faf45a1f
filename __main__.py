"""`python -m onnxc` is the command `onnxc`."""

from .tools.cli import main

main()
