"""Which tokens stay: one policy a file."""
