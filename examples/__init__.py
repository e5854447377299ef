"""Small programs a user copies. A regular package, so that `python -m examples.quickstart` finds this one and no other."""
