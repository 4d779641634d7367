"""What a model still knows: metrics, and the distributed evaluator."""
