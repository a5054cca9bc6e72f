"""The page that a report is: what stands in it, and what a browser makes of it."""
