"""The search behind ``lathe.optimize``: pipelines tried, judged on samples apart, timed in processes of their own."""
