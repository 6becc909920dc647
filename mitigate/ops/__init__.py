"""Pure tensor functions shared by methods."""
