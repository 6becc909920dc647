"""From Hydra overrides to a checked, fully resolved run. Nothing else in the project imports Hydra."""
