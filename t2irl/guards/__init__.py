"""Formulas of the guards against reward hacking: pure functions in float64 and small controllers, without models."""
