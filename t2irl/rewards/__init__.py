"""Rewards, one file each: how a score enters RL. What the networks are stands in `reward_models`."""
