"""The reward algebra: how several scores become one advantage. Formulas in float64, and the little state that they need."""
