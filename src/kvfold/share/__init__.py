"""One cache for several layers: one method a file."""
