"""Positive continuations of film reviews: an example of rewards that are Python functions."""
