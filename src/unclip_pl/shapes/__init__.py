"""Shapes: a built-in data set with captions and an exact oracle."""
