"""Machinery: what every program needs and no paper mentions; it knows no image, no network."""
