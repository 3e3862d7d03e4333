"""Integers in few bits. Nothing but NumPy is needed here."""
