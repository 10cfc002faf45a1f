"""The commands of `onnxc`, a file each; `..cli` loads one when it is asked for."""
