"""How the models in assets/ are trained; `scripts/build_assets.py` runs it."""
