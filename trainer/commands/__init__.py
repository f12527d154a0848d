"""The larger commands of `python -m trainer`, one module each."""
