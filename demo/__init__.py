"""A small, really trained text-to-video checkpoint in the layout of Latte, and the programs that make and score it."""
