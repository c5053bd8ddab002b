"""What code written for other packages imports in place of them."""
