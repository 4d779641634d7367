"""Estimates what scoring would cost before it runs."""
