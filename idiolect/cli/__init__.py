"""The command line.

PyTorch is loaded by experiment, compare, train and screens, which are imported by the commands that need them.
"""
