"""What actors and workers of any kind need, whatever they compute."""
