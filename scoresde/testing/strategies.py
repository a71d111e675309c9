"""Hypothesis strategies for everything a user may write or pass: valid, and adversarial."""
