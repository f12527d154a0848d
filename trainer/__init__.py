"""Train the network, export it, and prove that every exported file answers like it."""
