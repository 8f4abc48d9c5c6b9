"""RL fine-tuning of text-to-image diffusion and flow models, built against reward hacking."""

__version__ = "0.1.0"
