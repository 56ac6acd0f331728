"""Images from weights, for labels and text alike."""
