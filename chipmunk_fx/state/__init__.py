"""What sites keep between steps."""
