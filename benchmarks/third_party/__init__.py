"""Networks of other people, trained elsewhere and sampled with fastddim."""
