"""The tests of the whole service."""
