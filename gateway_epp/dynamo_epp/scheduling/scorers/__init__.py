"""How good each worker is for a request: one module for each scorer, scores in [0, 1]."""
