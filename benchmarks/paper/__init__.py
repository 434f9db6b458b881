"""The paper's experiments on the bundled models: how they are measured and shown."""
