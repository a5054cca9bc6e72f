"""Pipeline stages and schedules (floor 4)."""
