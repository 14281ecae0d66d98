"""Packing: image-caption shards from folders, COCO or the shapes renderer."""
