"""How a process keeps its jobs in a store, and sees those of other processes there."""
