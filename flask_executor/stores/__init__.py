"""The stores; each is imported only when it is configured. ``STORES`` in ``executor/config.py`` registers them."""
