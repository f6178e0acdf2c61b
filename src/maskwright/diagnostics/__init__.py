"""Looking at a machine and at training runs."""
