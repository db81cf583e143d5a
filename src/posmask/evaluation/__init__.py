"""Evaluation of trained SAEs: one module per metric family, and the suite that runs them."""
