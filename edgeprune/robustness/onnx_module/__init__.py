"""An ONNX file as a torch module with gradients."""
