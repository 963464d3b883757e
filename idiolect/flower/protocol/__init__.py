"""What a coordinator and a site send each other."""
