"""The ground floor: arrays, graphs and files. Knows no models, no prompts and no torch."""
