"""What tensors the published model files hold: names, shapes and sensible random values, nothing of ComfyUI."""
