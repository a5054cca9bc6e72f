"""What will a run need? Memory, time, traffic and idle time, counted without a GPU (floor 7)."""
