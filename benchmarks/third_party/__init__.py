"""Networks that others trained, sampled with fastddim."""
