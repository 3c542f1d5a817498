"""Studies of the paper: rows of runs beside published numbers, what makes them, and the page."""
