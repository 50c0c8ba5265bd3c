"""From a diffusers checkpoint to a bundle; the only package that may import torch, diffusers or transformers."""
