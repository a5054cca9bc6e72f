"""`megatron-fp4 study`: reading a study's YAML, starting its runs, and showing what they say (studies/)."""
