"""Configuration files: presets."""
