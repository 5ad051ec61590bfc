"""The channels of this API process to the runners of loaded instances."""
