"""Backbones: any released or own network, by name or file, as the right module."""
