"""The command line, one file a command; the only part of the package that prints.

A command fills a request from its options, calls the library and prints rows; it computes nothing. `console` has what
all of them share, `options` the options that several take.
"""
