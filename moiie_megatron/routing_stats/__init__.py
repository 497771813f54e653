"""What the routers did: buffers of a layer, records of a run."""
