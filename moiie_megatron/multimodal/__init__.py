"""Vision encoder, connector and language model as one model."""
