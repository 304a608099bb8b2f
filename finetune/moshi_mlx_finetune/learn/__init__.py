"""What is trained, on what loss, at what rate, and in how much memory."""
