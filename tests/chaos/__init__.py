"""Chaos: real jobs on the real servers while processes, servers, disks and clocks fail, and an audit of what is left.

``python -m tests.chaos --jobs 200 --faults 120 --seed 1`` (``make chaos``); what is promised: docs/guarantees.md.

A run, as ``__main__`` has it:

1. ``fleet`` starts servers, relays before them (``tests.relays``), gateways, control loops and workers; ``material``
   trains two small models and uploads them.
2. ``callers`` post jobs and checkpoints at an even pace, follow some, and write down what they were told.
3. ``monkey`` meanwhile lets the faults of a plan loose, drawn from the catalogue of ``faults``, and mends them all.
4. ``audit``, once every job has ended or none ends any more, holds rows, events, store, scratch folders and processes
   against what was promised.
5. ``figures`` says how long recovery, cancels and drains took. The last line is JSON.

What the fleet is made of: ``processes`` (each started again when it ends, with a clock of its own, ``clock.c``),
``worker_process`` (a worker whose runners are chosen), ``runner`` (plays the ``profile`` that a job's seed draws and
leaves a trace, or becomes the real runner).

Beside it: ``acceptance``, a second program, which kills a gateway as its 202 arrives, with ``forking_gateway``, back in
milliseconds; ``hosts``, workers behind a cable that can be pulled, for ``tests/worker``; and the tests of the auditor
and of ``acceptance``.
"""
