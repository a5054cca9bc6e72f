"""What do the steps and the whole run cost? Seconds by term, links and memory, failures, hours, energy."""
