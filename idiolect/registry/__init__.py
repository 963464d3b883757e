"""What a name in a setting stands for."""
