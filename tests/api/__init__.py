"""The tests of the gateway over HTTP."""
