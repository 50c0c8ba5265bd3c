"""Runs a bundle: text to latents to frames, with Foresight's reuse.

Needs numpy or CuPy, an engine library and a tokenizer; no torch.
"""
