"""What models are to their base and to one another: measured in one pass, told as a report."""
