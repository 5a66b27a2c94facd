"""Attention over stored tokens: the arithmetic, apart from where the tokens come from."""
