"""preventative."""
