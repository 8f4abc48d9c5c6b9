"""Where rollouts are drawn: one file an engine, and the boundary between them and the trainer."""
