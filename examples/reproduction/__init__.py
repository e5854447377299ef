"""The paper's comparison at the scale of two CPU cores. Start it with `make reproduce` or `python -m examples.reproduction one`."""
