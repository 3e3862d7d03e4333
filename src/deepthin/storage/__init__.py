"""The ``.thin`` file: what it holds, how it is written, and how it is read without trusting it."""

from deepthin.storage.contents import Part  # pickles of version 0.1 name it here

__all__ = ["Part"]
