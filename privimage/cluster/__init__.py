"""Submission of runs to a cluster's scheduler."""
