"""Rules that were tried beside the package's policies and are not part of it, one file each.

Each runs in the package's own loop, as any policy. Those that spare whole steps come twice: with the last computed
output held, as most of them were published, and with the extrapolation that `forecast` makes.
"""
