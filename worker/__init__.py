"""The control loop, the Celery worker and its supervisor; only ``worker.runner`` imports torch."""
