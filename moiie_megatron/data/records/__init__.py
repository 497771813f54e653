"""Record files: LLaVA JSON, JSON lines, tar shards."""
