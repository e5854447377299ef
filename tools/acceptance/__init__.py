"""The parts of `tools/gpu_acceptance.py`, one file a part; docs/h200.md says what each of them checks."""
