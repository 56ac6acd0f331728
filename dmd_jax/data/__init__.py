"""What the training reads: images, noise-image pairs, and the loader that batches either."""
