"""Measures, statistics and the report: what lets a stranger check that a model forgot."""
