"""report-generator: what a person reads of a study and of a sweep, and the same facts as JSON."""
