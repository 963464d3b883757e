"""Tools for testing methods, public so that users check their own: checks, small worlds, textbook oracles."""
