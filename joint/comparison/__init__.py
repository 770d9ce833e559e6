"""Comparing variants: what an ablation file stands for, its runs, and what their differences are worth."""
