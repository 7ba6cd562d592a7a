"""What gateway, control loop and worker share. Never imports torch."""
