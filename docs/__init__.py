"""Docs: what is written about the code, and the exercises of the course. Nothing imports it."""
