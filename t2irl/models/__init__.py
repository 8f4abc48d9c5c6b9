"""Model families, one file each: how a pipeline folder is loaded, its text encoded, its velocity and pictures computed."""
