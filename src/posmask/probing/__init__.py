"""Probing tasks: labeled datasets, order tasks, pooling and probes."""
