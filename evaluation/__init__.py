"""Evaluation: one protocol of the papers a file, its arithmetic first and its task last."""
