"""Configuration files; packaged as ``mitigate.conf``."""
