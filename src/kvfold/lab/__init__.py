"""Measuring what a cache costs: generation, quality, bytes and speed."""
