"""What clients meet: HTTP, text and streams. Stands on router/control, which knows nothing of it."""
