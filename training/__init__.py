"""dsv4-mini: training data, trainer, export. Nothing here is in the installed package."""
