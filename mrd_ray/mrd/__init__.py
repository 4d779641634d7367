"""The metric, in pure torch: no Ray, no files."""
