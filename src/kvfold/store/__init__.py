"""How tokens are held: one codec a file."""
