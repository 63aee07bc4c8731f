"""Curation: from a large pool of images to a set that is worth training on, stage by stage."""
