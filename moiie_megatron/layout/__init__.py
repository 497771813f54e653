"""Which experts exist, which tokens may use them, and on which rank each one is; no torch."""
