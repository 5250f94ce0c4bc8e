"""The vocabulary of the problem: pure data and pure functions, without transport, store or network."""
