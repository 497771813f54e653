"""What the routers did: counters of a layer and of a model, records of a run, their totals."""
