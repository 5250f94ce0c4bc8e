"""What the services share: the vocabulary, the pipeline, and the records in the store."""
