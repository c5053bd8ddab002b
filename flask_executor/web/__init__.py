"""The HTTP face of executors."""
