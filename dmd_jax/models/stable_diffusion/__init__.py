"""Stable Diffusion's U-Net and autoencoders."""
