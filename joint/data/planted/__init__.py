"""The planted funnel: a world whose truth is known, its incumbent, and the log of what that serves."""
