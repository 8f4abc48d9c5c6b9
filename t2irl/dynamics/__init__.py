"""Dynamics, one file each: how a transition from one noise level to the next is sampled and scored."""
