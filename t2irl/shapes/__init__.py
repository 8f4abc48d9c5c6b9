"""The shapes world: captioned pictures whose true reward is computed, not guessed.

Captions (`captions`), a renderer (`render`) and a verifier (`verify`). The trainer knows nothing of this package: it
meets the world only as a diffusers checkpoint, prompt files and reward classes.
"""
