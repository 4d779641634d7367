"""A model and data to try the main job on."""
