"""Who I talk to: process bootstrap, the mesh of ranks, and collectives over explicit groups (floor 2)."""
