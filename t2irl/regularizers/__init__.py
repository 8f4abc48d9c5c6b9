"""Regularisers, one file each: shape advantages, add loss terms, act after an update."""
