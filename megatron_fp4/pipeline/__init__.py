"""Pipeline stages and schedules (floor 3)."""
