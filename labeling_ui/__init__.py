"""The humans: the label store, the ranking app, simulated annotators."""
