"""func.yaml, the description of a function project that LIFL shares with Knative's func."""
