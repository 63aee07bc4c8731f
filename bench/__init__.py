"""Bench: how fast, how large, and against whom. It may import anything; nothing imports it."""
