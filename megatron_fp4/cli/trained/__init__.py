"""Commands that look at a trained run: how good it is, what it says, and what lm-eval finds of it."""
