"""The quickstart: one tiny model, three objectives and their Pass@k side by side. Start it with `python -m examples.quickstart`."""
