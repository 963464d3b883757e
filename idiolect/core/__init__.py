"""The contract: all that an author of a method imports."""
