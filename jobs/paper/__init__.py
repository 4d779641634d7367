"""The experiments of arXiv 2504.06658: one module each, run with `python -m jobs.paper`."""
