"""Kernels that are compiled: attention over packed blocks, with the same results as kvfold.attention.reference."""
