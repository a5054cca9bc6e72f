"""Facts of other rooms as text and pages; nothing is computed here."""
