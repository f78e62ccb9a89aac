"""The parts of a model: projections, norms, rotary embedding, attention, feed-forward."""
