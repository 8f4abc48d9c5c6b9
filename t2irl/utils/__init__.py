"""Small helpers shared by the pipeline's stages."""
