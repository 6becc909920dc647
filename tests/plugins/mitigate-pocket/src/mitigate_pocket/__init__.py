"""Pocket-VL, a toy family that transformers lacks, for mitigate."""
