"""The `mrd-ray` command line."""
