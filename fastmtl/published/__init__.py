"""Published results as data: a CSV per data set, a row per number, and where each number is from (``sources.yaml``)."""
