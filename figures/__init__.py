"""Figures: one picture in each file, made from images, weights or runs."""
