"""Training of SAEs: loss and gradients, the loop, checkpoints, and strategies for several processes."""
