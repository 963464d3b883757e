"""Loops over clients: who takes part, in which order examples come, what is remembered, what is measured."""
