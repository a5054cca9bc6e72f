"""The order of samples: sample number -> (source, document, offset), a pure function of seed and blend."""
