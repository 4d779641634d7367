"""The experiments of arXiv 2504.06658, each a sweep of Ray tasks, a finding, and what the paper says of it."""
