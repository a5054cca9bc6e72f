"""Does it compute what it should? Layouts, resumes, operands, GEMMs, machines, proved on a whole trainer (floor 7)."""
