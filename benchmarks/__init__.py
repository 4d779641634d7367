"""What the engine costs, beside bounds and peers measured in the same run: `python -m benchmarks NAME`."""
