"""A seeded cohort of synthetic spines in CT. Every picture and number that comes from it says "phantom"."""
