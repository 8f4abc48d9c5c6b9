"""What the guards against reward hacking are made of: formulas in float64, small controllers, evaluations of a reward."""
