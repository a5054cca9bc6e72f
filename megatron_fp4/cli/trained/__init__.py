"""Commands that look at a trained run: how good it is, what it says, what lm-eval finds of it, why its loss spiked."""
