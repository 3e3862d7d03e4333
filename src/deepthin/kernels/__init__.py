"""Native code, the NumPy references that define what it computes, and the predicted cost of each way to multiply."""
