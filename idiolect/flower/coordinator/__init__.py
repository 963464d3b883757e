"""The coordinator: rounds over the sites that have joined."""
