"""`make science`: small trainings that show whether papers' claims hold of what Weightsmith makes of real models."""
