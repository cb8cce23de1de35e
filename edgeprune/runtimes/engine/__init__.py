"""TensorRT engine files, their build script, and CUDA by ctypes."""
