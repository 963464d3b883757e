"""One contestant a file: sets itself up, then plays one round for every line on its standard input."""
