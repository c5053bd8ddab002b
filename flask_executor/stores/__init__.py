"""The stores; each is imported only when it is configured."""
