"""Experts on several ranks: sparse exchange, expert parallelism and placement."""
