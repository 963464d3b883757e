"""What two or more parts share."""
