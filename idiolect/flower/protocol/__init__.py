"""The protocol between coordinator and site: tensors, messages, and the form of a model."""
