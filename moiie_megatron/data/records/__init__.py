"""Record files (LLaVA JSON arrays and JSON lines) and the tar shards made from them."""
