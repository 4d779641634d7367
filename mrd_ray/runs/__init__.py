"""Run directories: their files, the driver that works in them, and what people see of a run."""
