"""Which experts exist, who may use them, and where they live; no torch."""
