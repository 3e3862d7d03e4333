"""deepthin for TensorFlow."""
