"""Trained policies, and how often they reach their goal by the steps they are given."""
