"""Configuration files: presets, and values tuned per model."""
