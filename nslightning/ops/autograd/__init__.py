"""How a chosen derivative enters the backward: selections, autograd functions, ties, windows."""
