"""Models at full size without their weights: configs, random weights, what a forward pass costs."""
