"""Sparse autoencoders: activation rules, selection of latents, encoding, decoding and files."""
