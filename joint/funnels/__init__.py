"""A run's funnel measured, swept over quotas, drawn and written down."""
