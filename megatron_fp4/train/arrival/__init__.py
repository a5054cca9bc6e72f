"""How a rank comes to its job: what all ranks must have alike, and how one refuses so that all end."""
