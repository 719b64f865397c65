"""Measures of utility, fidelity and memorisation of a synthetic set, and the report."""
