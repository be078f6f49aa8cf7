"""The objectives.  The maths first, then which pass of the model feeds which formula."""
