"""Keeping all tokens, reading a part: one method a file."""
