"""Parity with the original implementations: the same weights and inputs must give the same outputs."""
