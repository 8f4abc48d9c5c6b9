"""Algorithms, one file each: named loss terms of a micro-batch."""
