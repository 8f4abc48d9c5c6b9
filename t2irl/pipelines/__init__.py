"""What model families that are diffusers pipelines share; t2irl/models holds the families themselves."""
