"""The kernels of a CPU, compiled by numba: one call where plain torch starts thirty operators on a few numbers each.

Each is compared with the same references, by the same tests, as the Triton kernel of its name.
"""
