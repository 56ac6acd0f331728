"""Speed: our step and its peer in PyTorch, timed in turns."""
