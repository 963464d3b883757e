"""Side-by-side timing of our engines, a bare loop and other systems; see README.md."""
