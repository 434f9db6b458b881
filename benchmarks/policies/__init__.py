"""Trained policies, and the share of episodes that reach the goal by number of steps."""
