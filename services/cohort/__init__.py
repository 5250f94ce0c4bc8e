"""A cohort file through the nightly run's own services: rows, one pass over their images, and the table."""
