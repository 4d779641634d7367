"""What the engine costs, compared with bounds and peers in the same run: `python -m benchmarks NAME`."""
