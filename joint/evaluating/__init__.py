"""Measuring a model: its heads on logged candidates, on the corpus, and as a funnel."""
