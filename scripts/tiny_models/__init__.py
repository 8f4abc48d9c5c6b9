"""Random pipeline folders that are made in a moment: everything of genuine ones, only small."""
