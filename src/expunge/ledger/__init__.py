"""Where requests, events and certificates are kept, so that nothing is lost and nothing can be changed unseen."""
