"""Timing thin layers against dense ones, interleaved."""
