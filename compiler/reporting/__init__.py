"""What the report page shows besides the passes: which nodes became which, what became of the weights, times."""
