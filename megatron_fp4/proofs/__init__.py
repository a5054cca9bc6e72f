"""Does it compute what it should? Layouts, resumes, operands, GEMMs and machines, proved on a whole trainer (floor 7)."""
