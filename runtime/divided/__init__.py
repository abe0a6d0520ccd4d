"""Running a model that was divided: stages, ranks, and what they hand to each other."""
