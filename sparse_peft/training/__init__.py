"""Training loops: the controller, its callback, and the package's optimizers."""
