"""The GPU check: what it measures, and the times predicted for it."""
