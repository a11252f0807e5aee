"""Small sets that the project wrote itself, for a first run without a network."""
