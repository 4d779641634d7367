"""Scoring at scale: work units, actors, the Ray Data pipeline, the scores table."""
