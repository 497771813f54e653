"""Vision encoder, connector and decoder as one model."""
