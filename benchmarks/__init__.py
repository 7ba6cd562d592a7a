"""Ours against a baseline, in one process run; each module is a script."""
