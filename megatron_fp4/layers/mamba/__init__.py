"""Mamba-2: the mixer, its scan, its convolution, and how both cross context-parallel ranks."""
