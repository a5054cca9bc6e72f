"""What a run tells those who watch it from outside: events and their hook, a file for Prometheus, its state."""
