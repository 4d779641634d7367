"""Run directories: what is in them, who works in them, and what people see of a run."""
