"""Unlearning with MRD weights: Ray Train over DeepSpeed ZeRO."""
