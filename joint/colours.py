"""The colours of every picture: Okabe and Ito's (2008), told apart by all eyes, three more, and greys."""

from __future__ import annotations

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
VERMILLION, SKY, BLACK = "#D55E00", "#56B4E9", "#000000"
SERIES = (BLUE, ORANGE, GREEN, PINK, VERMILLION, SKY, BLACK, "#8C6D1F", "#7F7F7F", "#5B3A8C")  # side by side
HEADS = {"retrieval": BLUE, "pre_ranking": ORANGE, "ranking": PINK}

DARK, MIDDLE, LIGHT = "#595959", "#BBBBBB", "#E5E5E5"  # of words, of what stands back, of grids and bands
