"""From a configuration to a plan of every matrix: which method stores it, in how many bits."""
