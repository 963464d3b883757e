"""The contract: everything that the author of a method imports."""
