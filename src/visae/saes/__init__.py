"""Sparse autoencoders: the module, sparsity kinds, losses, initialisation and the checkpoint."""
