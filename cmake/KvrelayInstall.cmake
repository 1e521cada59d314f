# Install rules and the bundle.
