"""Everybody who works on one host, in random order, against the real program: `machine` is the model, `world` the two labs."""
