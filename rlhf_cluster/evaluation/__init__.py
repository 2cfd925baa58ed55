"""Judging a policy on held-out prompts: samples them, scores them with a labeler that training never saw, and
compares."""
