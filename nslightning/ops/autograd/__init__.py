"""The mechanisms that bring a chosen derivative into the backward: selections, autograd functions, ties, windows."""
