"""Evaluation: a protocol of the papers in each file, and what all of them start from."""
