"""What is seen of a run: metrics, console, norms, quantization, speed."""
