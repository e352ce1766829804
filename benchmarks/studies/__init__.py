"""Questions larger than one op: a training step, the same training twice, padding, loading, tile sizes."""
