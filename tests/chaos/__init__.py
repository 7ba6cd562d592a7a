"""Chaos: real jobs on the real servers while processes, servers, disks and clocks fail, and an audit of what is left.

``python -m tests.chaos --jobs 200 --faults 120 --seed 1`` (``make chaos``). See docs/guarantees.md.
"""
