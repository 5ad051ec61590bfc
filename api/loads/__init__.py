"""The loads of clients: accepting, following, streaming and stopping them."""
