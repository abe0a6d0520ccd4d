"""From torch to a graph, checked against torch."""
