"""The tests of the embedded servers."""
