"""Which experts exist and who may use them."""
