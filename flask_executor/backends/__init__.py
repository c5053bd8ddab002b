"""The backends; each is imported only when it is configured."""
