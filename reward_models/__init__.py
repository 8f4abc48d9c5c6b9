"""What the reward networks are: loading, preprocessing, forward pass. Knows nothing of RL, and never imports `t2irl`."""
