"""What a caller may pass, and how it becomes the rows that a decoder reads."""
