"""Export models to ONNX, OpenVINO and PyTorch's own format, and check what was exported before it is kept."""
