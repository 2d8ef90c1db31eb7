"""Attention mechanisms, one file each, on the operations of ``attnbench.kernels``."""
