"""How good samples are: features of images, Fréchet distances, agreement with a classifier."""
